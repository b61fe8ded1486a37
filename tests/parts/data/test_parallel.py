"""Parallel text to examples of an encoder-decoder: which text is the source, what is cut, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import WORDS, framed_tokenizer, two_language_tokenizer

from nybble.core.errors import DataError, UsageError
from nybble.data.parallel import Parallel, collate, load_parallel


def read(folder: Path, rows: list[Any], seq_len: int = 16, tokenizer: Any = None) -> Parallel:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_parallel(str(path), tokenizer or framed_tokenizer(), seq_len=seq_len, pad=0)


def words(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


@pytest.mark.parametrize(
    "row",
    [
        {"source": "ba be", "target": "bi"},
        {"src": "ba be", "tgt": "bi"},
        {"text": "ba be", "summary": "bi"},
        {"source": "ba be", "translation": "bi"},
        {"id": 7, "translation": {"en": "ba be", "ro": "bi"}},
    ],
)
def test_what_is_source_and_what_target(tmp_path: Path, row: dict[str, Any]) -> None:
    found = read(tmp_path, [row])
    (made,) = found.rows
    assert (words(made["input_ids"]), words(made["labels"])) == ("<s> ba be </s>", "<s> bi </s>")
    assert (made["source"], made["target"]) == ("ba be", "bi") and found.targets == 3


def test_a_target_has_the_tokens_of_its_own_language(tmp_path: Path) -> None:
    (row,) = read(tmp_path, [{"source": "ba", "target": "be"}], tokenizer=two_language_tokenizer()).rows
    assert (words(row["input_ids"]), words(row["labels"])) == ("ba </s>", "be <s>")


def test_languages_are_the_tokenizers_or_those_of_the_first_record(tmp_path: Path) -> None:
    rows = [{"translation": {"en": "ba", "ro": "be"}}, {"translation": {"ro": "bi", "en": "bo"}}]
    assert [row["source"] for row in read(tmp_path, rows).rows] == ["ba", "bo"]
    tokenizer = framed_tokenizer()
    tokenizer.src_lang, tokenizer.tgt_lang = "ro_RO", "en_XX"
    assert [row["source"] for row in read(tmp_path, rows, tokenizer=tokenizer).rows] == ["be", "bi"]
    three = [{"translation": {"en": "ba", "ro": "be", "de": "bi"}}]
    assert read(tmp_path, three, tokenizer=tokenizer).rows[0]["target"] == "ba"
    with pytest.raises(DataError, match=r"line 1: 'translation' holds en, ro, de; a source and its target are needed"):
        read(tmp_path, three)
    with pytest.raises(DataError, match=r"line 2: 'translation' holds en, de; en and ro are needed"):
        read(tmp_path, [rows[0], {"translation": {"en": "ba", "de": "be"}}])


def test_a_batch_is_the_one_of_transformers_collator(tmp_path: Path) -> None:
    from transformers import DataCollatorForSeq2Seq

    found = read(tmp_path, [{"source": "ba", "target": "be bi bo"}, {"source": "ba be", "target": "bi"}])
    tokenizer = framed_tokenizer()
    tokenizer.pad_token = "<unk>"
    collator: Any = DataCollatorForSeq2Seq(tokenizer)
    theirs = collator([{name: row[name] for name in ("input_ids", "labels")} for row in found.rows])
    batch = collate(found.rows)
    assert batch.keys() == theirs.keys()
    assert all(torch.equal(batch[name], theirs[name]) for name in batch)


def test_long_texts_lose_their_end(tmp_path: Path) -> None:
    found = read(tmp_path, [{"source": "ba be bi bo", "target": "ba be bi"}, {"source": "ba", "target": "be"}], 4)
    assert words(found.rows[0]["input_ids"]) == words(found.rows[0]["labels"]) == "<s> ba be </s>"
    assert found.rows[0]["target"] == "ba be bi"  # what is judged against is whole
    assert found.shortened == 2 and found.manifest()["targets"] == 7


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"source": "ba"}, r"line 1 has no target: give 'source' and 'target'.*its fields: source"),
        ({"target": "ba"}, r"line 1 has no source"),
        ({"source": "ba", "target": ""}, r"'target' is empty"),
        ({"source": None, "target": "be"}, r"'source' is empty"),
        ({"source": "ba", "target": 3}, r"'target' is a int"),
        ({"translation": {"en": "ba", "ro": " "}}, r"'translation.ro' is empty"),
        ({"translation": {"en": "ba"}}, r"'translation' holds en; a source and its target are needed"),
        ("ba", r"line 1 is a str, not an object"),
    ],
)
def test_what_is_no_pair_is_refused(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, [row])


def test_tables_and_other_sources(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("source,target\nba,be\nbi,\n")
    with pytest.raises(DataError, match=r"record 2 \(line 3\): 'target' is empty"):
        load_parallel(str(table), framed_tokenizer(), seq_len=8, pad=0)
    table.write_text("source,target\nba,be\n")
    assert load_parallel(str(table), framed_tokenizer(), seq_len=8, pad=0).rows[0]["target"] == "be"
    with pytest.raises(UsageError, match="leaves no room"):
        load_parallel(str(table), framed_tokenizer(), seq_len=2, pad=0)
    with pytest.raises(UsageError, match="holds no records"):
        load_parallel("builtin", framed_tokenizer(), seq_len=8, pad=0)
