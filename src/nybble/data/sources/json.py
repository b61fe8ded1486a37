"""JSON, one object a line or one list of objects: a document from each one (:mod:`nybble.data.rows`).

Which of the two a file is shows its content, whatever its name: many a ``.json`` holds lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nybble.core.errors import DataError
from nybble.data.files import ending, read_utf8
from nybble.data.rows import row_record
from nybble.data.text import Part, Record, TextSource, looks_like_path, make_source, whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Json:
    """A path that ends in ``.jsonl``, ``.ndjson`` or ``.json``, packed or not."""

    fallback = False

    def accepts(self, src: str) -> bool:
        """True for a path with such an ending; a missing file is told so when read."""
        return ending(src) in (".jsonl", ".ndjson", ".json") and looks_like_path(src)

    def read(self, src: str, part: Part, tokenizer: PreTrainedTokenizerBase | None) -> TextSource:
        """Return a document per record; blank lines are passed over."""
        return make_source(_documents(src, tokenizer), name=src, note=whole(src))


PART = Json()


def _documents(src: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Record]:
    for row, place in json_rows(src):
        yield row_record(row, place, tokenizer)


def json_rows(src: str) -> Iterator[tuple[Any, str]]:
    """Each record of a file as it is, and where it stands; blank lines are passed over.

    Raises:
        FileError, DataError: as :func:`nybble.data.files.read_utf8`, or a line that is not JSON.
    """
    text = read_utf8(src).removeprefix("\ufeff")
    records = _listed(text) if ending(src) == ".json" else None
    if records is not None:
        yield from ((row, f"{src}, record {number}") for number, row in enumerate(records, start=1))
        return
    # Not splitlines(): it also cuts at characters such as U+2028, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{src}, line {number} is not JSON: {error}. Each line must be one JSON object.") from None
        yield row, f"{src}, line {number}"


def _listed(text: str) -> list[Any] | None:
    """The records of one JSON document: a list, or the only list of an object; else the object itself.

    None where it isn't one document, so that it is read line by line, with the error of the line.
    """
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
    if isinstance(found, list):
        return found
    lists = [value for value in found.values() if isinstance(value, list)] if isinstance(found, dict) else []
    if len(lists) == 1 and not {"text", "messages", "source"} & set(found):
        return list(lists[0])
    return [found]
