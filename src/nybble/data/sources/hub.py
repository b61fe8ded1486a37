"""A data set of the hub, ``ID[:CONFIG[:SPLIT]]``, through the ``datasets`` library (an extra)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nybble.core.errors import DataError, did_you_mean
from nybble.data.rows import row_record
from nybble.data.text import SOURCES, Part, Record, TextSource, looks_like_path, make_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORM = re.compile(r"(?P<id>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[\w.-]*)(:(?P<split>[\w.\[\]%:-]+))?)?")


class Hub:
    """Whatever has the form of a hub id and is no path."""

    fallback = True

    def accepts(self, src: str) -> bool:
        """True for ``owner/name`` or ``name``, with ``:config`` and ``:split`` if wanted."""
        return _FORM.fullmatch(src) is not None and src != "builtin" and not looks_like_path(src)

    def read(self, src: str, part: Part, tokenizer: PreTrainedTokenizerBase | None) -> TextSource:
        """Return a document per record of the split, ``train`` unless SRC names another; data sets run no code."""
        found = _FORM.fullmatch(src)
        assert found is not None
        split = found["split"] or "train"
        rows = _fetch(src, found["id"], found["config"] or None, split)
        note = f"split {split} of the hub data set {found['id']}, the same for calibration and evaluation"
        return make_source(_documents(rows, src, tokenizer), name=src, note=note)


PART = Hub()


def _fetch(src: str, name: str, config: str | None, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        hint = did_you_mean(src, SOURCES.names()) if "/" not in src else ""
        raise DataError(
            f"there is no file {src!r}, and to look for it on the hub the library 'datasets' is needed"
            f" (pip install 'nybble[hub]').{hint} 'builtin' needs nothing."
        ) from None
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # offline, no such id, config or split: each library version has its own classes
        raise DataError(
            f"hub data set {name!r} (config {config or 'default'}, split {split!r}) can't be loaded:"
            f" {type(error).__name__}: {error}. Check the name and the network, or give a local file or 'builtin'."
        ) from error


def _documents(rows: Any, src: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        yield row_record(row, f"{src}, record {number}", tokenizer)
