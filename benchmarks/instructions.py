"""Instructions and answers out of what Debian's packages carry: real data to fine-tune on, without any hub.

    apt-get install python3.11-doc
    python benchmarks/instructions.py FOLDER

FOLDER gets ``train.jsonl`` and ``held.jsonl``, a JSON object a line with ``instruction`` and ``output``:

- what a function, class or constant of Python's library is, in the words of its reference (python3.11-doc);
- what a Debian package is, in its own one line (the index that ``apt-cache dumpavail`` prints).

Pages and source packages are whole in one of the two files: a tenth of them is held out, chosen by a hash of their
names. The same versions give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from texts import PACKAGES, package_version

from nybble.core.files import atomic_write_bytes

LIBRARY = PACKAGES["python3.11-doc"].root / "library"
SHORTEST, LONGEST = 40, 1200
"""Characters of an answer from the reference: less says nothing, and more is a chapter."""
TENTH, EIGHTH = 10, 8
_SKIPPED = {"pre", "table", "script", "style"}


@dataclass
class _Entry:
    """A definition that is being read."""

    signatures: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


class _Definitions(HTMLParser):
    """Sphinx's ``<dl class="py function">``: signatures and the paragraphs right below them."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[_Entry] = []
        self._lists: list[_Entry | None] = []  # open <dl>, those of definitions with their entry
        self._skipping = 0
        self._inside = ""  # dt, p, or nothing that is kept
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open a definition, one of its signatures, or a paragraph."""
        classes = (dict(attrs).get("class") or "").split()
        if tag == "dl":
            self._lists.append(_Entry() if classes[:1] == ["py"] else None)
        elif tag in _SKIPPED or "headerlink" in classes:
            self._skipping += 1
        elif tag in ("dt", "p") and self._lists and self._lists[-1] is not None:
            self._inside, self._text = tag, []

    def handle_endtag(self, tag: str) -> None:
        """Keep what was read."""
        if tag in _SKIPPED or (tag == "a" and self._skipping):
            self._skipping = max(0, self._skipping - 1)
        elif tag == self._inside:
            entry = self._lists[-1]
            line = " ".join("".join(self._text).split())
            if entry is not None and line:
                (entry.signatures if tag == "dt" else entry.lines).append(line)
            self._inside = ""
        elif tag == "dl" and self._lists:
            closed = self._lists.pop()
            self.found += [] if closed is None else [closed]

    def handle_data(self, data: str) -> None:
        """Text of a signature or a paragraph."""
        if self._inside and not self._skipping:
            self._text.append(data)


Record = tuple[str, str, str]
"""What must stay together, instruction, answer."""


def of_reference(folder: Path) -> Iterator[Record]:
    """Definitions of Python's library."""
    for path in sorted(folder.glob("*.html")):
        parser = _Definitions()
        parser.feed(path.read_text(encoding="utf-8", errors="replace"))
        for entry in parser.found:
            answer = "\n".join(entry.lines)
            if entry.signatures and SHORTEST <= len(answer) <= LONGEST:
                yield path.stem, f"What does Python's reference say about this?\n{entry.signatures[0]}", answer


def of_packages(index: str) -> Iterator[Record]:
    """An eighth of the packages, by source: their own lines about themselves."""
    for block in index.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and line[0] != " ")
        name, line, section = (fields.get(key, "") for key in ("Package", "Description", "Section"))
        source = fields.get("Source", name).split(" ")[0]
        if name and line and _hash(source + "/kept") % EIGHTH == 0:
            yield source, f"In one line, what is the Debian package {name}, of the section {section}?", line


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def main() -> None:
    """Write both files and say on standard error what they are."""
    parser = argparse.ArgumentParser(description="Write instructions and answers as JSON lines.")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    if not LIBRARY.is_dir():
        sys.exit(f"there is no {LIBRARY}: run apt-get install python3.11-doc")
    index = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[str]] = {"train": [], "held": []}
    seen: set[tuple[str, str]] = set()
    for group, instruction, output in (*of_reference(LIBRARY), *of_packages(index)):
        if (instruction, output) not in seen:
            seen.add((instruction, output))
            row = json.dumps({"instruction": instruction, "output": output}, ensure_ascii=False)
            rows["held" if _hash(group) % TENTH == 0 else "train"].append(row + "\n")
    print(f"python3.11-doc {package_version('python3.11-doc')}", file=sys.stderr)
    for name, lines in rows.items():
        content = "".join(lines).encode()
        atomic_write_bytes(folder / f"{name}.jsonl", content)
        print(f"{name}: {len(lines):,}, sha256 {hashlib.sha256(content).hexdigest()}", file=sys.stderr)


if __name__ == "__main__":
    main()
