"""A table with a line of column names: a document from each record's ``text`` (:mod:`nybble.data.rows`)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nybble.core.errors import DataError
from nybble.data.files import ending, read_utf8
from nybble.data.rows import row_record
from nybble.data.text import Part, Record, TextSource, looks_like_path, make_source, whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATORS = {".csv": ",", ".tsv": "\t"}


class Table:
    """A path that ends in ``.csv`` or ``.tsv``, packed or not."""

    fallback = False

    def accepts(self, src: str) -> bool:
        """True for a path with such an ending; a missing file is told so when read."""
        return ending(src) in SEPARATORS and looks_like_path(src)

    def read(self, src: str, part: Part, tokenizer: PreTrainedTokenizerBase | None) -> TextSource:
        """Return a document per record."""
        return make_source(_documents(src, tokenizer), name=src, note=whole(src))


PART = Table()


def _documents(src: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Record]:
    for row, place in table_rows(src):
        yield row_record(row, place, tokenizer)


def table_rows(src: str) -> list[tuple[dict[str, str | None], str]]:
    """Each record by its column names, and where it begins; None where a record ends early.

    Raises:
        FileError, DataError: as :func:`nybble.data.files.read_utf8`; no table, or a record with more fields than names.
    """
    text = read_utf8(src).removeprefix("\ufeff")
    before = csv.field_size_limit(len(text) + 1)  # the module's own limit is shorter than many a document
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=SEPARATORS[ending(src)], strict=True)
    found = []
    try:
        names = reader.fieldnames
        line = reader.line_num + 1
        for number, row in enumerate(reader, start=1):
            place = f"{src}, record {number} (line {line})"
            if any(more.strip() for more in row.get(None) or ()):
                count = len(names or ()) + len(row[None])
                raise DataError(
                    f"{place} has {count} fields for {len(names or ())} columns. Put quotes around a field that holds "
                    "the separator."
                )
            found.append(({key: value for key, value in row.items() if key}, place))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{src} is no table: {error}.") from error
    finally:
        csv.field_size_limit(before)
    return found
