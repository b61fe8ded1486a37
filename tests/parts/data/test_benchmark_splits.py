"""benchmarks/descriptions.py and translations.py: what is held out is not trained on; what they write is read."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import descriptions, translations
from benchmarks.optimizer_quality.pack import judges
from benchmarks.optimizer_quality.sources import Described
from benchmarks.splits import letters, split, write
from tests.tiny import WORDS, framed_tokenizer

from nybble.data.labelled import class_reader, load_labelled
from nybble.data.parallel import load_parallel

HELD = [f"source{i}" for i in range(400) if judges(f"source{i}")]
TRAINED = [f"source{i}" for i in range(400) if not judges(f"source{i}")]


def package(name: str, source: str, section: str, description: str) -> Described:
    return Described(name=name, source=source, section=section, summary=f"the {name}", description=description)


def test_descriptions_that_are_held_out_are_not_trained_on(tmp_path: Path) -> None:
    found = [package(f"p{i}", TRAINED[i % 50], "net", f"ba be {'x' * (i + 1)}") for i in range(99)]
    found += [package("rare", TRAINED[0], "hamradio", "Sends."), package("last", TRAINED[0], "net", "ba bi")]
    found += [package(name, HELD[i], "net", "Ba-bi 2!") for i, name in enumerate(("a", "b"))]  # as "last" is
    found += [package(name, HELD[i], "net", "bo bu") for i, name in enumerate(("c", "d"))]
    found += [package("e", HELD[2], "net", f"{'bu ' * 300}end")]
    rows = split(descriptions.items(found))
    assert descriptions.sections(found) == ["net"] and len(rows["train"]) == 100  # one section has too few
    assert [row["text"].split("\n")[0] for row in rows["held"]] == ["the c", "the e"]
    assert rows["held"][1]["text"].endswith(" bu") and 595 < len(rows["held"][1]["text"]) <= 600
    write(tmp_path, rows)
    path = str(tmp_path / "held.jsonl")
    read = load_labelled(
        path, framed_tokenizer(), class_reader(["net"]), seq_len=8, pad=0, arguments=["input_ids"]
    )  # fmt: skip
    assert [row["label"] for row in read.rows] == [0, 0]


def test_pairs_with_the_same_letters_are_in_one_file(tmp_path: Path) -> None:
    names = [f"{a} {b}" for a in WORDS[3:9] for b in WORDS[3:]]
    held = next(name for name in names if judges(letters(name)))
    pairs = [(held, "eins"), (held.upper() + "...", "zwei"), ("one", "drei"), ("ba be", "vier"), ("ba be", "vier")]
    pairs += [("ba be", "andere"), ("12 34", "none")]
    rows = split(translations.items(pairs))
    assert [row["target"] for row in rows["held"]] == ["eins"]
    assert [row["target"] for row in rows["train"]] == ["vier", "andere"]
    write(tmp_path / "de", rows)
    assert [json.loads(line) for line in (tmp_path / "de/held.jsonl").read_text().splitlines()] == rows["held"]
    read = load_parallel(str(tmp_path / "de/train.jsonl"), framed_tokenizer(), seq_len=8, pad=0)
    assert [row["source"] for row in read.rows] == ["ba be", "ba be"]
