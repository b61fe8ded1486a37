"""Records of a source and its target, parallel text, to training examples of an encoder-decoder.

A record has both as strings, or by language under ``translation``. Source and target get the special tokens that the
tokenizer puts around each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nybble.core.errors import DataError
from nybble.data.encoded import Encoded, digest, encoded, mask_of, padded
from nybble.data.pairs import IGNORED
from nybble.data.records import needed_records, parsed, string

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCES = ("source", "src", "text", "document", "article")
TARGETS = ("target", "tgt", "summary", "highlights")
BY_LANGUAGE = "translation"
FIELDS = "'source' and 'target' (or 'translation' with a text by each language)"
SIDES = ("text", "text_target")
"""What a tokenizer calls a source and a target."""
Pair = tuple[str, str]


class Parallel(Encoded):
    """Rows have ``input_ids``, ``labels`` (ids of the target), both texts as they were written, and ``pad``.

    ``source`` and ``target`` are the texts, ``pad`` is the token that is put behind shorter sources.
    """

    @property
    def targets(self) -> int:
        """Tokens that the loss looks at."""
        return sum(len(row["labels"]) for row in self.rows)


def load_parallel(src: str, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, pad: int) -> Parallel:
    """Read SRC as pairs of source and target.

    Args:
        src: records as JSON lines, a JSON list, or a table (CSV, TSV) with a line of names. Under ``translation`` the
            source is of the language that the tokenizer has for sources, or else of the first record's first language.
        tokenizer: of the model.
        seq_len: most tokens of a source, and of a target, special ones included; what is longer loses its end.
        pad: token that the model takes for padding.

    Raises:
        UsageError: a SRC of another kind, or a length without room for a word. FileError: it can't be read.
        DataError: records without source or target, by their lines.
    """
    languages = _tokenizer_languages(tokenizer)

    def parse(row: Any, place: str) -> Pair:
        nonlocal languages
        by_language = row.get(BY_LANGUAGE) if isinstance(row, Mapping) else None
        if not isinstance(by_language, Mapping):
            return _pair(row, place)
        if languages is None and len(by_language) == 2:
            languages = tuple(map(str, by_language))
        return _of_languages(by_language, languages, place)

    texts = parsed(src, needed_records(src, FIELDS), parse)
    (sources, cut), (targets, more) = (
        encoded({side: [pair[i] for pair in texts]}, tokenizer, seq_len) for i, side in enumerate(SIDES)
    )
    rows = tuple(
        {"input_ids": ids, "labels": labels, "source": pair[0], "target": pair[1], "pad": pad}
        for ids, labels, pair in zip(sources["input_ids"], targets["input_ids"], texts, strict=True)
    )
    return Parallel(rows=rows, source=src, sha256=digest(rows, "labels"), shortened=cut + more)


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Examples as a batch, padded on the right; what the decoder reads, the model makes of the labels.

    Returns:
        ``input_ids``, ``attention_mask``, int64 [rows, longest source], and ``labels`` [rows, longest target],
        ``IGNORED`` behind their ends.
    """
    ids = [row["input_ids"] for row in rows]
    labels = padded([row["labels"] for row in rows], IGNORED)
    return {"input_ids": padded(ids, rows[0]["pad"]), "attention_mask": mask_of(ids), "labels": labels}


def _pair(row: Any, place: str) -> Pair:
    if not isinstance(row, Mapping):
        raise DataError(f"{place} is a {type(row).__name__}, not an object with {FIELDS}.")
    source = next((name for name in SOURCES if name in row), None)
    target = next((name for name in (*TARGETS, BY_LANGUAGE) if name in row), None)
    if source is None or target is None:
        fields = ", ".join(map(str, row)) or "none"
        lacking = "source" if source is None else "target"
        raise DataError(f"{place} has no {lacking}: give {FIELDS}; its fields: {fields}.")
    return _filled(row[source], source, place), _filled(row[target], target, place)


def _of_languages(texts: Mapping[str, Any], languages: tuple[str, ...] | None, place: str) -> Pair:
    """The texts of both languages, by their names or what a name begins with: ``en`` is ``en_XX``, too."""
    found = []
    for language in languages or ():
        key = next((key for key in texts if key == language), None)
        key = key or next((key for key in texts if _base(key) == _base(language)), None)
        found += [] if key is None else [_filled(texts[key], f"{BY_LANGUAGE}.{key}", place)]
    if len(found) != 2:
        wanted = " and ".join(languages or ("a source", "its target"))
        given = ", ".join(map(str, texts)) or "nothing"
        raise DataError(f"{place}: 'translation' holds {given}; {wanted} are needed. Or write 'source' and 'target'.")
    return found[0], found[1]


def _base(language: str) -> str:
    return str(language).lower().partition("_")[0].partition("-")[0]


def _filled(value: Any, name: str, place: str) -> str:
    if value is None or not string(value, name, place).strip():
        raise DataError(f"{place}: {name!r} is empty. Remove the record, or fill it.")
    return str(value)


def _tokenizer_languages(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...] | None:
    """The languages of sources and targets, where a tokenizer says them: mBART's and NLLB's, Marian's."""
    for names in (("src_lang", "tgt_lang"), ("source_lang", "target_lang")):
        found = tuple(getattr(tokenizer, name, None) for name in names)
        if all(isinstance(language, str) and language for language in found):
            return tuple(map(str, found))
    return None
