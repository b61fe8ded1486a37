"""Questions about Debian packages, from the descriptions that every Debian system has: examples/tasks/packages.jsonl.

    python examples/tasks/make_packages.py [--status /var/lib/dpkg/status] [--count 96]

Each has a package's description and four one-line summaries, one of them its own, the others of packages whose
summaries are nearest to it in length. The same status file and seed give the same questions.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

SHORTEST, LONGEST = 160, 420  # characters of a description


def packages(status: Path) -> dict[str, tuple[str, str]]:
    """Name -> (summary, first paragraph), of packages that have both and don't name the summary there."""
    found: dict[str, tuple[str, str]] = {}
    seen: set[str] = set()
    for block in status.read_text(encoding="utf-8").split("\n\n"):
        fields: dict[str, list[str]] = {}
        key = ""
        for line in block.splitlines():
            if line[:1].isspace():
                fields[key].append(line.strip())
            else:
                key, _, value = line.partition(": ")
                fields[key] = [value.strip()]
        summary, *text = fields.get("Description", [""])
        lines = text[: text.index(".")] if "." in text else text
        paragraph = " ".join(" ".join(lines).split())
        fits = SHORTEST <= len(paragraph) <= LONGEST and 20 <= len(summary) <= 70
        if fits and summary.lower() not in paragraph.lower() and not {summary, paragraph} & seen:
            seen |= {summary, paragraph}
            found[fields["Package"][0]] = (summary, paragraph)
    return found


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--status", type=Path, default=Path("/var/lib/dpkg/status"))
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("packages.jsonl"))
    given = parser.parse_args()
    found, draw = packages(given.status), random.Random(0)
    names = sorted(draw.sample(sorted(found), min(given.count, len(found))))
    with given.out.open("w", encoding="utf-8") as file:
        for name in names:
            summary, paragraph = found[name]
            others = sorted(
                (s for s, _ in found.values() if s != summary), key=lambda s: (abs(len(s) - len(summary)), s)
            )
            choices = [summary, *draw.sample(others[:12], 3)]
            draw.shuffle(choices)
            answer = choices.index(summary)
            row = {"package": name, "description": paragraph, "choices": choices, "answer": answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
