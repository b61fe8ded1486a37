"""Records with a label to training examples of a classifier, or of a head that gives one number.

A record has a text or two (``text``, ``sentence``, ``premise`` and ``hypothesis`` ...) and ``label``: the name of a
class, its number, or, for one number, that number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nybble.core.errors import DataError, did_you_mean
from nybble.data.encoded import Encoded, digest, encoded, mask_of, padded
from nybble.data.records import needed_records, parsed, string

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TWO = (
    ("text", "text_pair"), ("text", "text2"), ("text1", "text2"), ("sentence1", "sentence2"), ("premise", "hypothesis"),
    ("question1", "question2"), ("question", "sentence"),
)  # fmt: skip
"""Names of a first and a second text, as public data sets have them."""
ONE = ("text", "sentence")
LABEL = "label"
FIELDS = "'text' (or 'sentence'; perhaps a second one, 'text_pair') and 'label'"
_WHOLE = re.compile(r"[+-]?\d+")
_UNNAMED = re.compile(r"LABEL_\d+")
Label = int | float
Read = Callable[[Any, str], Label]
"""A record's label, and its place for the error, as the head takes it."""
Texts = tuple[str, ...]


class Labelled(Encoded):
    """Rows have ``input_ids`` and perhaps ``token_type_ids``, ``label``, and ``pad``, the token behind shorter ones."""

    @property
    def targets(self) -> int:
        """Records: each has one label."""
        return len(self.rows)

    def manifest(self) -> dict[str, Any]:
        """As of all; ``classes``: how many different labels there are."""
        return {**super().manifest(), "classes": len({row["label"] for row in self.rows})}


def load_labelled(
    src: str, tokenizer: PreTrainedTokenizerBase, read: Read, *, seq_len: int, pad: int, arguments: Sequence[str]
) -> Labelled:
    """Read SRC as labelled examples.

    Args:
        src: records as JSON lines, a JSON list, or a table (CSV, TSV) with a line of names.
        tokenizer: of the model.
        read: a label as the model's head takes it: :func:`class_reader` or :func:`number`.
        seq_len: most tokens of an example, special ones included; of two texts the longer loses its end first.
        pad: token that the model takes for padding.
        arguments: of the model's forward: which of what the tokenizer makes is kept.

    Raises:
        UsageError: a SRC of another kind, or a length without room for a word. FileError: it can't be read.
        DataError: records without text or label, or with a label that the head doesn't have, by their lines.
    """
    rows = needed_records(src, FIELDS)
    made = parsed(src, rows, lambda row, place: (_texts(row, place), read(_label(row, place), place)))
    tokens, shortened = encoded(_columns([texts for texts, _ in made], src), tokenizer, seq_len)
    kept = [name for name in tokens if name in arguments and name != "attention_mask"]
    found = tuple(
        {**{name: tokens[name][i] for name in kept}, "label": label, "pad": pad} for i, (_, label) in enumerate(made)
    )
    return Labelled(rows=found, source=src, sha256=digest(found, "label"), shortened=shortened)


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Examples as a batch, padded on the right.

    Returns:
        ``input_ids``, ``attention_mask``, perhaps ``token_type_ids``, int64 [rows, longest]; ``labels`` [rows], int64
        of classes, float32 of numbers.
    """
    ids = [row["input_ids"] for row in rows]
    found = {"input_ids": padded(ids, rows[0]["pad"]), "attention_mask": mask_of(ids)}
    for name in rows[0].keys() - {"input_ids", "label", "pad"}:
        found[name] = padded([row[name] for row in rows], 0)
    return {**found, "labels": torch.tensor([row["label"] for row in rows])}


def class_names(config: Any) -> list[str]:
    """A classifier's classes by number; none of another model."""
    named = getattr(config, "id2label", None) or {}
    return [str(named.get(i, f"LABEL_{i}")) for i in range(int(getattr(config, "num_labels", 0)))]


def class_reader(names: Sequence[str]) -> Read:
    """Labels of classes called ``names``, the first of which is number 0; a number is taken for a class's, too."""

    def read(value: Any, place: str) -> int:
        if isinstance(value, str):
            if value in names:
                return names.index(value)
            if _WHOLE.fullmatch(value.strip()):
                return _in_range(int(value), names, place)
            raise DataError(f"{place}: the model has no class {value!r}.{_known(value, names)}")
        if isinstance(value, bool) or not isinstance(value, int):
            raise DataError(f"{place}: 'label' is {value!r}; it must be a class's name or its number.")
        if str(value) in names and names.index(str(value)) != value:
            raise DataError(
                f"{place}: label {value} could be the class of that number or the one of that name, which is number "
                f"{names.index(str(value))}. Write names, as strings."
            )
        return _in_range(value, names, place)

    return read


def number(value: Any, place: str) -> float:
    """A label that is a number.

    Raises:
        DataError: it is none, or not finite.
    """
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise DataError(f"{place}: 'label' is {value!r}; a model that gives one number learns from finite numbers.")
    return found


def _in_range(value: int, names: Sequence[str], place: str) -> int:
    if not 0 <= value < len(names):
        raise DataError(
            f"{place}: label {value}, and the model's head has {len(names)} classes, 0 to {len(names) - 1}. Take a "
            "model with more, or leave the record out."
        )
    return value


def _known(value: str, names: Sequence[str]) -> str:
    if all(map(_UNNAMED.fullmatch, names)):
        return (
            f" Its config names none (id2label is {names[0]} ...): give numbers, 0 to {len(names) - 1}, or write the "
            "names into id2label of its config.json."
        )
    return did_you_mean(value, names)


def _texts(row: Any, place: str) -> Texts:
    if not isinstance(row, Mapping):
        raise DataError(f"{place} is a {type(row).__name__}, not an object with {FIELDS}.")
    both = next((names for names in TWO if all(row.get(name) is not None for name in names)), None)
    names = both or tuple(name for name in ONE if name in row)[:1]
    if not names:
        fields = ", ".join(map(str, row)) or "none"
        raise DataError(f"{place} has no text to classify: give {FIELDS}; its fields: {fields}.")
    found = tuple(string(row[name], name, place) for name in names)
    if not any(text.strip() for text in found):
        raise DataError(f"{place}: {names[0]!r} is empty. Remove the record, or fill it.")
    return found


def _label(row: Mapping[str, Any], place: str) -> Any:
    """A record's label; in a table an empty field is none."""
    found = row.get(LABEL)
    if found is None or found == "":
        fields = ", ".join(map(str, row))
        raise DataError(f"{place} has no 'label'; its fields: {fields}. Remove the record, or fill it.")
    return found


def _columns(texts: Sequence[Texts], src: str) -> dict[str, tuple[str, ...]]:
    """All first texts, and all second ones, by the tokenizer's argument.

    Raises:
        DataError: some have a second text and others none.
    """
    two = sum(len(each) > 1 for each in texts)
    if 0 < two < len(texts):
        raise DataError(
            f"data {src!r} has two texts in {two} of {len(texts)} records and one in the others. Give all of them "
            "equally many."
        )
    return dict(zip(("text", "text_pair"), zip(*texts, strict=True), strict=False))
