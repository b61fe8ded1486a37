"""Records to train on and to judge on, as JSON lines: what belongs together is in one of the two files."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.optimizer_quality.pack import judges

from nybble.core.files import atomic_write_bytes

PARTS = ("train", "held")


class Item(NamedTuple):
    """A record, the name of what it belongs to, and what no record of the other part may share with it."""

    record: Mapping[str, Any]
    group: str
    alike: Hashable


def letters(text: str) -> str:
    """What is left of a text without its case, its digits and its signs: two of one are too much alike."""
    return "".join(sign for sign in text.casefold() if sign.isalpha())


def split(items: Iterable[Item]) -> dict[str, list[Mapping[str, Any]]]:
    """``train``, and ``held``: a sixteenth of the groups, by a hash of their names.

    Equal records are in once. What is held out is alike to nothing in ``train``, and to nothing else that is held out.
    """
    found: dict[str, dict[str, Item]] = {part: {} for part in PARTS}
    for item in items:
        part = found["held" if judges(item.group) else "train"]
        part.setdefault(json.dumps(item.record, sort_keys=True), item)
    known = {item.alike for item in found["train"].values()}
    held: dict[Hashable, Item] = {}
    for item in found["held"].values():
        if item.alike not in known:
            held.setdefault(item.alike, item)
    return {
        "train": [item.record for item in found["train"].values()],
        "held": [item.record for item in held.values()],
    }


def write(folder: Path, rows: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """``PART.jsonl`` of each part; on standard error how many records it has, and its sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in rows.items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        content = "".join(lines).encode()
        atomic_write_bytes(folder / f"{name}.jsonl", content)
        print(f"{folder / name}: {len(lines):,}, sha256 {hashlib.sha256(content).hexdigest()}", file=sys.stderr)
