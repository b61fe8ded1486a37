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
    text = read_utf8(src).removeprefix("\ufeff")
    before = csv.field_size_limit(len(text) + 1)  # the module's own limit is shorter than many a document
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=SEPARATORS[ending(src)], strict=True))
    except csv.Error as error:
        raise DataError(f"{src} is no table: {error}.") from error
    finally:
        csv.field_size_limit(before)
    for number, row in enumerate(rows, start=1):
        yield row_record({key: value for key, value in row.items() if key}, f"{src}, record {number}", tokenizer)
