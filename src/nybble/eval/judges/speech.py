"""Speech recognizers: word and character error rates of what they understand.

CTC models are read off frame by frame, encoder-decoders generate greedily. Both transcripts are compared as
:func:`nybble.data.transcripts.normalised` has them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nybble.core.errors import DataError
from nybble.core.progress import Progress, task
from nybble.data.samples import Origin, Samples
from nybble.data.speech import SpeechSamples
from nybble.data.transcripts import error_rates, understood
from nybble.eval.judges import Judge, Panel, Verdict

BATCH = 4
PLAYED = 1 << 20
"""Bytes of a sound, at most, that a report holds."""


class Speech(Judge):
    """Of whatever turns sound into text."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Both need transcripts."""
        return ("wer", "cer")

    def judge(self, panel: Panel, progress: Progress) -> Verdict:
        """Every model hears every utterance."""
        samples, texts = panel.samples, _texts(panel.samples)
        found, count = {}, len(texts)
        with task(progress, len(panel.models) * -(-count // BATCH), "evaluate") as bar:
            for name, model in panel.models.items():
                told: list[str] = []
                for start in range(0, count, BATCH):
                    told += understood(model, panel.origins[name], _some(samples, start, start + BATCH))
                    bar.advance()
                rates = error_rates(texts, told)
                found[name] = {metric: rates[metric] for metric in panel.metrics}
        return Verdict(metrics=found, counts={"words": sum(len(text.split()) for text in texts)})

    def texts(self, models: Mapping[str, Any], origin: Origin, samples: Samples, count: int) -> list[dict[str, str]]:
        """What was said in the first utterances, what each model understands, and the sound, if it is short."""
        texts = _texts(samples)[:count]
        if not texts or not isinstance(samples, SpeechSamples):
            return []
        told = {name: understood(m, origin, _some(samples, 0, len(texts))) for name, m in models.items()}
        return [
            {"prompt": text, **_sound(path), **{name: each[i] for name, each in told.items()}}
            for i, (text, path) in enumerate(zip(texts, samples.paths, strict=False))
        ]


def _texts(samples: Samples) -> list[str]:
    texts = getattr(samples, "texts", ())
    known = [text for text in texts if text is not None]
    if not known or len(known) < len(texts):
        raise DataError(
            f"data {samples.source!r} has {len(known)} transcripts for {len(texts)} sounds, and error rates need all: "
            "a .txt beside each WAV, a metadata.csv, a transcripts.jsonl, or LibriSpeech's *.trans.txt."
        )
    return known


def _some(samples: Samples, start: int, stop: int) -> dict[str, Tensor]:
    return {name: tensor[start:stop] for name, tensor in samples.inputs.items() if not name.startswith("decoder")}


def _sound(path: Path) -> dict[str, str]:
    """A file as an address that a page can play by itself; nothing where it is too large for that."""
    if path.suffix.lower() != ".wav" or path.stat().st_size > PLAYED:
        return {}
    return {"audio": f"data:audio/wav;base64,{base64.b64encode(path.read_bytes()).decode()}"}


PART = Speech()
