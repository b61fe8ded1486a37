"""Descriptions of Debian packages and the section that each is in: real labels to train a text classifier on.

    python -m benchmarks.descriptions FOLDER       # on Debian 12

FOLDER gets ``train.jsonl`` and ``held.jsonl``, a JSON object a line with ``text`` (a package's line about itself, and
the beginning of its description) and ``label`` (its section, of those with a hundred packages or more), and
``labels.json``, the sections in the order of their numbers. All packages of one source are in one of the two files,
and no description that is held out is trained on under another name. The same package index gives the same bytes.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from benchmarks.optimizer_quality.pack import LEAST
from benchmarks.optimizer_quality.sources import Described, descriptions
from benchmarks.splits import Item, letters, split, write

from nybble.core.files import atomic_write_json

CHARACTERS = 600
"""Of a text: about 130 tokens."""


def text_of(package: Described) -> str:
    """Its own line, and as many whole words of its description as there is room for."""
    words = f"{package.summary}\n{package.description}"
    if len(words) <= CHARACTERS:
        return words
    return words[: CHARACTERS + 1].rsplit(maxsplit=1)[0]


def sections(packages: list[Described]) -> list[str]:
    """Those with enough packages, by name."""
    counts = Counter(package.section for package in packages)
    return sorted(name for name, count in counts.items() if count >= LEAST)


def items(packages: list[Described]) -> list[Item]:
    """One a package of these sections."""
    known = set(sections(packages))
    return [
        Item({"text": text_of(p), "label": p.section}, p.source, letters(p.description))
        for p in packages
        if p.section in known
    ]


def main() -> None:
    """Write the files and say on standard error what they are."""
    parser = argparse.ArgumentParser(description="Write descriptions and sections of Debian packages as JSON lines.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--raw", type=Path, default=Path("build/optq/raw"), help="where the package index is kept")
    asked = parser.parse_args()
    found = descriptions(asked.raw)
    write(asked.folder, split(items(found)))
    atomic_write_json(asked.folder / "labels.json", sections(found))


if __name__ == "__main__":
    main()
