"""Utterances as speech models hear them: features that the model's own extractor makes, and transcripts.

A model's folder says in ``preprocessor_config.json`` how sound becomes features, and transformers has the class. Each
utterance is heard by itself, and zeros stand behind the shorter ones of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nybble.core.errors import DataError, UsageError
from nybble.data.audio import Recording, read_sound, recordings
from nybble.data.samples import Origin, Wanted
from nybble.data.tokens import check_count, pick

Ears = Callable[[np.ndarray], dict[str, Tensor]]
"""Samples of a sound to a model's inputs, without a dimension of utterances."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SpeechSamples:
    """Utterances for calibration or evaluation.

    Attributes:
        inputs: ``input_features`` or ``input_values``, float32, utterances in front; ``attention_mask``, int64, where
            the model takes one; of encoder-decoders ``decoder_input_ids`` and their mask.
        texts: what is said in each, None where nothing says so. paths: of the files.
        seconds: of sound. sha256: of the main input.
        available: how many utterances the source has. source: SRC.
    """

    inputs: dict[str, Tensor]
    texts: tuple[str | None, ...]
    paths: tuple[Path, ...]
    seconds: float
    sha256: str
    available: int
    source: str

    @property
    def tokens(self) -> int:
        """About how many vectors a layer sees: frames of features; of waves, which layers first cut, 320 samples."""
        main = next(iter(self.inputs.values()))
        return main.shape[0] * (max(main.shape[1:]) if main.dim() > 2 else -(-main.shape[1] // 320))

    def manifest(self) -> dict[str, Any]:
        """What stands beside every number from these utterances."""
        return {
            "source": self.source, "features_sha256": self.sha256, "samples": len(self.paths),
            "seconds": round(self.seconds, 2), "transcripts": sum(text is not None for text in self.texts),
        }  # fmt: skip


def speech_samples(src: str, origin: Origin, wanted: Wanted) -> SpeechSamples:
    """Read a folder (:mod:`nybble.data.audio`) and make a model's inputs of it.

    Args:
        src: the folder.
        origin: the model's place: how it hears, and the tokenizer of an encoder-decoder.
        wanted: how many utterances, and which.

    Raises:
        UsageError: nothing says how the model hears. FileError, DataError: a file can't be read or doesn't fit.
    """
    check_count(wanted.samples)
    ears, rate = ears_of(origin)
    found = recordings(src)
    available, count = len(found), wanted.samples or len(found)
    if count > available and not wanted.fewer:
        raise DataError(f"data {src!r} has {available} utterances, fewer than the {count} asked for.")
    chosen = [found[i] for i in pick(available, min(count, available), wanted.seed).tolist()]
    heard, seconds = hear(chosen, ears, rate)
    inputs = stacked(heard)
    if getattr(origin.config, "is_encoder_decoder", False):
        inputs |= answers([each.text or "" for each in chosen], origin)
    main = next(iter(inputs.values()))
    return SpeechSamples(
        inputs=inputs,
        texts=tuple(each.text for each in chosen),
        paths=tuple(each.path for each in chosen),
        seconds=seconds,
        sha256=hashlib.sha256(main.numpy().astype("<f4", copy=False).tobytes()).hexdigest(),
        available=available,
        source=src,
    )


def hear(chosen: Sequence[Recording], ears: Ears, rate: int) -> tuple[list[dict[str, Tensor]], float]:
    """A model's inputs of each file, and how many seconds they are.

    Raises:
        FileError, DataError: as :func:`~nybble.data.audio.read_sound`; or a sound too short for features.
    """
    made, samples = [], 0
    for each in chosen:
        sound = read_sound(each.path, rate)
        samples += len(sound)
        try:
            made.append(ears(sound))
        except (ValueError, RuntimeError, IndexError) as error:
            raise DataError(f"{each.path}: no features can be made of its {len(sound)} samples: {error}.") from error
        if not bool(torch.isfinite(next(iter(made[-1].values()))).all()):
            raise DataError(f"{each.path} is too short for features: {len(sound)} samples, {rate} a second.")
    return made, samples / rate


def ears_of(origin: Origin) -> tuple[Ears, int]:
    """How a model hears: its feature extractor, and the samples a second that it wants.

    Raises:
        UsageError: nothing says so, or transformers has no such extractor.
    """
    import transformers

    told = dict(origin.preprocessing() or getattr(origin.config, "preprocessing", None) or {})
    name = str(told.get("feature_extractor_type", ""))
    made = getattr(transformers, name, None) if name.endswith("FeatureExtractor") else None
    if made is None:
        said = f"names {name!r}, which transformers doesn't have" if name else "is missing, or names none"
        raise UsageError(
            f"how this model hears isn't known: preprocessor_config.json with its feature_extractor_type {said}. Save "
            "the model's feature extractor beside it, or give its inputs as tensors from Python."
        )
    extractor = made.from_dict(told)
    return partial(_features, extractor), int(extractor.sampling_rate)


def _features(extractor: Any, sound: np.ndarray) -> dict[str, Tensor]:
    fixed = "max_length" if hasattr(extractor, "nb_max_frames") else "longest"  # Whisper always hears 30 seconds
    found = extractor(sound, sampling_rate=extractor.sampling_rate, padding=fixed, return_tensors="pt")
    names = [name for name in ("input_features", "input_values", "attention_mask") if name in found]
    return {name: found[name][0].float() if name != "attention_mask" else found[name][0].long() for name in names}


def stacked(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Inputs of several utterances as one batch, zeros behind the shorter ones; utterances in front."""
    return {name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], True) for name in rows[0]}


def answers(texts: Sequence[str], origin: Origin) -> dict[str, Tensor]:
    """What the decoder of an encoder-decoder reads when it has said these texts, and which of it is no padding.

    Returns:
        ``decoder_input_ids`` and ``decoder_attention_mask``, int64 [texts, longest].
    """
    config, tokenizer = origin.config, origin.tokenizer()
    start, most = config.decoder_start_token_id, getattr(config, "max_target_positions", None)
    rows = []
    for text in texts:
        ids = tokenizer(text)["input_ids"][:most]
        rows.append(torch.tensor(ids[: max(1, len(ids) - 1)] if ids and ids[0] == start else [start, *ids[:-1]]))
    found = {"decoder_input_ids": rows, "decoder_attention_mask": [torch.ones_like(row) for row in rows]}
    return {name: torch.nn.utils.rnn.pad_sequence(each, True) for name, each in found.items()}
