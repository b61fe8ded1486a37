"""What was said and what was understood: spelling by CTC, words as they are compared, error rates."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import DataError, ModelError
from nybble.data.samples import Origin


def normalised(text: str) -> str:
    """As error rates compare it: small letters and digits, apostrophes inside words, single spaces.

    >>> normalised("Don't  stop -- it's 5 o'clock!")
    "don't stop it's 5 o'clock"
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    kept = "".join(c if c.isalnum() or c == "'" or unicodedata.combining(c) else " " for c in text)
    return " ".join(word.strip("'") for word in kept.split() if word.strip("'"))


def edits(wanted: Sequence[Any], found: Sequence[Any]) -> int:
    """The fewest insertions, deletions and substitutions that make one of the other (Levenshtein 1966).

    >>> edits("kitten", "sitting")
    3
    """
    row = list(range(len(found) + 1))
    for i, a in enumerate(wanted, start=1):
        last, row[0] = row[0], i
        for j, b in enumerate(found, start=1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


def error_rates(wanted: Sequence[str], found: Sequence[str]) -> dict[str, float]:
    """``wer`` and ``cer``: edits of all words, and of all characters with spaces, over how many were said.

    Args:
        wanted: transcripts.
        found: what a model made of each; both are :func:`normalised`.

    Raises:
        DataError: nothing was said in any of them.
    """
    pairs = [(normalised(a), normalised(b)) for a, b in zip(wanted, found, strict=True)]
    words, characters = sum(len(a.split()) for a, _ in pairs), sum(len(a) for a, _ in pairs)
    if not words:
        raise DataError("the transcripts hold no words, so there is no rate of errors.")
    return {
        "wer": sum(edits(a.split(), b.split()) for a, b in pairs) / words,
        "cer": sum(edits(a, b) for a, b in pairs) / characters,
    }


def collapsed(classes: Sequence[int], blank: int) -> list[int]:
    """What the likeliest classes of frames spell under CTC: runs count once, blanks not at all (Graves et al. 2006).

    >>> collapsed([0, 1, 1, 0, 1, 2, 2, 0], blank=0)
    [1, 1, 2]
    """
    return [key for key, _ in groupby(classes) if key != blank]


def speller(origin: Origin) -> Callable[[Sequence[int]], str]:
    """From ids to text: the characters that a config holds, or the tokenizer's."""
    characters = getattr(origin.config, "vocabulary", None)
    if isinstance(characters, str):
        return lambda ids: "".join(characters[i] for i in ids if i < len(characters))
    tokenizer: Any = origin.tokenizer()
    more = {"group_tokens": False} if "CTC" in type(tokenizer).__name__ else {}
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True, **more))


def spelled(logits: Tensor, frames: Sequence[int], config: Any) -> list[list[int]]:
    """Ids of the likeliest spelling of each utterance, frame by frame.

    Args:
        logits: float [utterances, frames, classes].
        frames: how many are of each utterance.
        config: the blank is its ``pad_token_id``, as in all CTC models of transformers.

    Raises:
        ModelError: NaN among the logits.
    """
    if not bool(torch.isfinite(logits).all()):
        raise ModelError("the logits hold NaN or infinity. Look for NaN weights, or try another dtype.")
    rows = logits.argmax(-1).tolist()
    return [collapsed(row[:count], config.pad_token_id) for row, count in zip(rows, frames, strict=True)]


@torch.no_grad()
def understood(model: Any, origin: Origin, inputs: Mapping[str, Tensor]) -> list[str]:
    """What a model makes of some utterances.

    Args:
        model: gives ``logits`` of frames (CTC), or generates.
        origin: its place, for characters or a tokenizer.
        inputs: as :class:`~nybble.data.speech.SpeechSamples` has them, without the decoder's.

    Raises:
        ModelError: a model that gives no text, or NaN.
    """
    first = next(p for p in model.parameters() if p.is_floating_point())
    given = {n: t.to(first.device, first.dtype if t.is_floating_point() else t.dtype) for n, t in inputs.items()}
    spell = speller(origin)
    if getattr(model.config, "is_encoder_decoder", False):
        return [spell(row) for row in model.generate(**given, do_sample=False, num_beams=1).tolist()]
    logits = getattr(model(**given), "logits", None)
    if logits is None or logits.dim() != 3:
        raise ModelError(f"a {type(model).__name__} gives no characters by frame, so it has no word error rate.")
    return [spell(ids) for ids in spelled(logits.float(), frames_of(model, inputs, logits.shape[1]), model.config)]


def frames_of(model: Any, inputs: Mapping[str, Tensor], frames: int) -> Sequence[int]:
    """How many frames of logits are of each utterance; all where there is no mask, or nobody says."""
    mask, count = inputs.get("attention_mask"), len(next(iter(inputs.values())))
    for name in ("_get_subsampling_output_length", "_get_feat_extract_output_lengths"):
        for part in (model, getattr(model, "encoder", None)):
            if mask is not None and hasattr(part, name):
                found: list[int] = getattr(part, name)(mask.sum(-1)).tolist()
                return found
    return [frames] * count
