"""A UTF-8 text file, packed or not: one document, taken as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nybble.data.files import read_utf8
from nybble.data.text import Part, TextSource, looks_like_path, make_source, whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Text:
    """Any path that no other kind takes."""

    fallback = True

    def accepts(self, src: str) -> bool:
        """True for a path; a missing file is told so when read."""
        return src != "builtin" and looks_like_path(src)

    def read(self, src: str, part: Part, tokenizer: PreTrainedTokenizerBase | None) -> TextSource:
        """Return the file's text as one document, line ends unchanged."""
        return make_source([read_utf8(src)], name=src, note=whole(src))


PART = Text()
