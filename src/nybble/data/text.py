"""Text to calibrate and to judge on: what a source is, and which one a SRC on the command line means.

Each kind of source is one file of :mod:`nybble.data.sources`; exactly one of them takes a given SRC.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from nybble.core.errors import DataError, FileError, UsageError, did_you_mean
from nybble.core.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = Literal["calibration", "evaluation"]

SOURCES = Registry(
    "nybble.data.sources",
    "data source",
    lambda part: not isinstance(part, type) and hasattr(part, "accepts") and hasattr(part, "read"),
)

_TEXT_ENDINGS = {
    ".txt", ".text", ".md", ".rst", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".html", ".xml", ".gz", ".bz2", ".xz",
    ".zst", ".zip", ".parquet", ".pdf",
}  # fmt: skip


class Record(NamedTuple):
    """A document, and what an encoder-decoder is to make of it, where the source says so."""

    text: str
    target: str = ""


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Documents, with what a manifest has to say about them.

    Attributes:
        documents: the non-empty texts, in a fixed order.
        targets: what an encoder-decoder is to make of each, empty for one without; no strings at all where none has.
        sha256: of the documents in UTF-8, joined by one NUL byte; of a plain text file what ``sha256sum`` prints.
        name: the SRC that was asked for.
        note: what these documents are, and whether calibration and evaluation see the same ones.
    """

    documents: tuple[str, ...]
    sha256: str
    name: str
    note: str
    targets: tuple[str, ...] = ()


class Source(Protocol):
    """One kind of SRC. ``fallback`` kinds are asked last."""

    fallback: bool

    def accepts(self, src: str) -> bool:
        """Whether ``src`` names a source of this kind; looks at its form and at the disk, reads nothing."""

    def read(self, src: str, part: Part, tokenizer: PreTrainedTokenizerBase | None) -> TextSource:
        """Return the documents of ``src``; the tokenizer renders chat messages and is needed for nothing else."""


def load_text(src: str, part: Part, tokenizer: PreTrainedTokenizerBase | None = None) -> TextSource:
    """Read the documents that SRC names.

    Args:
        src: ``builtin``, a UTF-8 text file (one document), a JSONL file (a document per line, from ``text`` or from
            chat ``messages``, perhaps with a ``target``: :mod:`nybble.data.rows`), JSON or a CSV table with the same
            fields, or a hub dataset ``ID[:CONFIG[:SPLIT]]``.
            Files may be packed by gzip, bzip2 or xz.
        part: which half of ``builtin``. Only ``builtin`` is split: every other source gives all its documents for
            either part, and its note says so; judge on another file than the one you calibrated on.
        tokenizer: renders ``messages`` with its chat template.

    Raises:
        UsageError: unknown part, or a SRC of no known kind.
        FileError: a file that isn't there or can't be read.
        DataError: no text in it, not UTF-8, a malformed line.
    """
    if part not in ("calibration", "evaluation"):
        raise UsageError(f"unknown part {part!r}.{did_you_mean(str(part), ['calibration', 'evaluation'])}")
    kinds: list[Source] = sorted(SOURCES.all().values(), key=lambda kind: kind.fallback)
    for kind in kinds:
        if kind.accepts(src):
            return kind.read(src, part, tokenizer)
    raise UsageError(
        f"data {src!r} is no text file, JSONL file or hub dataset id.{did_you_mean(src, SOURCES.names())}"
        " Give a path that exists, or 'builtin'."
    )


def check_source(src: str) -> None:
    """Refuse a SRC that can't be right, without reading anything; whether there is enough in it shows later.

    Raises:
        UsageError: an empty one. FileError: a path that doesn't exist.
    """
    if not src.strip():
        raise UsageError("the data's name is empty. Give a path that exists, or 'builtin'.")
    if looks_like_path(src) and not Path(src).expanduser().exists():
        raise FileError(f"data file {src!r} does not exist. Give a path that does, or 'builtin'.")


def make_source(documents: Iterable[str | Record], *, name: str, note: str) -> TextSource:
    """Make a TextSource of the documents that are not blank, with their targets.

    Raises:
        DataError: all are blank; or one holds half a surrogate pair, which no tokenizer takes.
    """
    kept: list[str] = []
    targets: list[str] = []
    for number, item in enumerate(documents, start=1):
        record = Record(item) if isinstance(item, str) else item
        if record.text.strip():
            place = f"data {name!r}, document {number}"
            kept.append(check_text(record.text, place))
            targets.append(check_text(record.target, place) if record.target.strip() else "")
    if not kept:
        raise DataError(f"data {name!r} holds no text: every document is empty. Give a source with text, or 'builtin'.")
    digest = hashlib.sha256("\0".join(kept).encode()).hexdigest()
    given = tuple(targets) if any(targets) else ()
    return TextSource(documents=tuple(kept), sha256=digest, name=name, note=note, targets=given)


def check_text(text: str, place: str) -> str:
    """Return ``text`` as it is.

    Raises:
        DataError: half a surrogate pair in it: JSON and command lines can carry one, UTF-8 and tokenizers can't.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} holds U+{ord(text[error.start]):04X} at character {error.start}, half of a surrogate pair and no "
            "character. Remove it, or write the whole pair."
        ) from None
    return text


def whole(name: str) -> str:
    """The note of a source that is not split."""
    return f"all of {name}, the same for calibration and evaluation"


def looks_like_path(src: str) -> bool:
    """Whether SRC exists on disk, or is written as only a path would be (``./x``, ``a/b/c``, ``x.txt``)."""
    path = Path(src).expanduser()
    if src.startswith((".", "/", "~")) or "\\" in src or src.count("/") > 1:
        return True
    try:
        return path.suffix.lower() in _TEXT_ENDINGS or path.exists()
    except OSError:  # longer than any name
        return False
