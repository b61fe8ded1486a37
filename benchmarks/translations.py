"""Strings of LibreOffice in English and in another language: real pairs to train a translator on.

    python -m benchmarks.translations FOLDER       # on Debian 12; English to Romanian and to German

FOLDER gets ``ro/train.jsonl`` and ``ro/held.jsonl``, ``de/...``, a JSON object a line with ``source`` and ``target``.
An English string is in the same file for every language, as is one that differs in case, digits and signs alone: what
is held out is trained on in none of them, and is there once. The same packages give the same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from benchmarks.optimizer_quality.sources import LANGUAGES, translations
from benchmarks.splits import Item, letters, split, write

WORDS = 2
"""Of an English string, at least."""


def items(pairs: Iterable[tuple[str, str]], words: int = WORDS) -> list[Item]:
    """One a pair whose English has so many words; what it is split by is its letters."""
    long = [pair for pair in pairs if len(pair[0].split()) >= words]
    return [Item({"source": en, "target": to}, letters(en), letters(en)) for en, to in long if letters(en)]


def main() -> None:
    """Write the files and say on standard error what they are."""
    parser = argparse.ArgumentParser(description="Write pairs of English and another language as JSON lines.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--raw", type=Path, default=Path("build/optq/raw"), help="where packages are kept")
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=["ro", "de"])
    parser.add_argument("--words", type=int, default=WORDS, help="of an English string, at least")
    asked = parser.parse_args()
    found = translations(asked.raw, asked.languages)
    for language in asked.languages:
        write(asked.folder / language, split(items(found[language], asked.words)))


if __name__ == "__main__":
    main()
