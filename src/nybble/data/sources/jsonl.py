"""A JSONL file: one JSON object a line, a document from its ``text`` or its chat ``messages``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nybble.core.errors import DataError
from nybble.data.files import read_utf8
from nybble.data.rows import row_text
from nybble.data.text import Part, TextSource, looks_like_path, make_source, whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Jsonl:
    """A path that ends in ``.jsonl``."""

    fallback = False

    def accepts(self, src: str) -> bool:
        """True for a path that ends in ``.jsonl``; a missing file is told so when read."""
        return src.endswith(".jsonl") and looks_like_path(src)

    def read(self, src: str, part: Part, tokenizer: PreTrainedTokenizerBase | None) -> TextSource:
        """Return a document per line; blank lines are passed over."""
        return make_source(_documents(src, tokenizer), name=src, note=whole(src))


PART = Jsonl()


def _documents(src: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    # Not splitlines(): it also cuts at characters such as U+2028, which JSON strings may hold.
    for number, line in enumerate(read_utf8(src).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{src}, line {number} is not JSON: {error}. Each line must be one JSON object.") from None
        yield row_text(row, f"{src}, line {number}", tokenizer)
