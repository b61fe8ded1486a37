"""Speech: features of utterances, as the model's own extractor makes them (:mod:`nybble.data.speech`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import UsageError
from nybble.data.kinds import DataKind
from nybble.data.samples import Origin, Wanted
from nybble.data.speech import SpeechSamples, speech_samples

_DONE = {"calibration": "calibrated", "evaluation": "judged"}
FRAMES = 500
"""Of features: five seconds, the length that Q-ASR synthesises."""


class Speech(DataKind):
    """``input_features`` or ``input_values``, and what else the model takes."""

    def prepare(self, src: str, origin: Origin, wanted: Wanted) -> SpeechSamples:
        """Read a folder of sounds; nothing is built in."""
        if src == "builtin":
            raise UsageError(
                f"a speech model is {_DONE[wanted.part]} on sound; give a folder of WAV files with "
                "transcripts (--data)."
            )
        return speech_samples(src, origin, wanted)

    def real(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """None: layers see fewer frames than the mask of the sound has, and padding is zeros, which move no range."""
        return None

    def example(self, model: Any, origin: Origin | None = None) -> dict[str, Tensor] | None:
        """Five seconds of silence, for CTC models of features: nybble's own, Parakeet; others say nothing."""
        own = getattr(model.config, "encoder_config", None)
        mels = getattr(model.config, "mels", None) or getattr(own, "num_mel_bins", None)
        return None if mels is None else {"input_features": torch.zeros(1, FRAMES, mels, dtype=torch.float32)}


PART = Speech()
