"""Records with labels to examples of a classifier: which texts, which class, what is refused and where it stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import WORDS, framed_tokenizer

from nybble.core.errors import DataError, NybbleError, UsageError
from nybble.data.labelled import Labelled, Read, class_reader, collate, load_labelled, number

NAMES = ("news", "sport", "weather")
ARGUMENTS = ("input_ids", "attention_mask", "token_type_ids")


def read(folder: Path, rows: list[Any], label: Read | None = None, seq_len: int = 16, **more: Any) -> Labelled:
    tokenizer = framed_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask", "token_type_ids"]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {"pad": 0, "arguments": ARGUMENTS, **more}
    return load_labelled(str(path), tokenizer, label or class_reader(NAMES), seq_len=seq_len, **given)


def words(row: dict[str, Any]) -> str:
    return " ".join(WORDS[i] for i in row["input_ids"])


def test_a_class_is_its_name_or_its_number(tmp_path: Path) -> None:
    found = read(tmp_path, [{"text": "ba be", "label": "sport"}, {"sentence": "bi", "label": 2}])
    assert [row["label"] for row in found.rows] == [1, 2]
    assert [words(row) for row in found.rows] == ["<s> ba be </s>", "<s> bi </s>"]
    assert found.targets == 2 and found.manifest()["classes"] == 2


@pytest.mark.parametrize(
    "names", [("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence")]
)
def test_two_texts_are_told_apart(tmp_path: Path, names: tuple[str, str]) -> None:
    (row,) = read(tmp_path, [dict(zip(names, ("ba be", "bi"), strict=True)) | {"label": 0}]).rows
    assert words(row) == "<s> ba be </s> bi </s>"
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    bare = read(tmp_path, [{"text": "ba", "label": 0}], arguments=("input_ids",)).rows[0]
    assert bare.keys() == {"input_ids", "label", "pad"}  # what the model takes


def test_a_batch_is_the_one_of_transformers_collator(tmp_path: Path) -> None:
    from transformers import DataCollatorWithPadding

    rows = [{"text": "ba", "text_pair": "be", "label": 0}, {"text": "ba be bi", "text_pair": "bo", "label": 2}]
    found = read(tmp_path, rows, pad=7)
    tokenizer = framed_tokenizer()
    tokenizer.pad_token = WORDS[7]
    theirs = DataCollatorWithPadding(tokenizer)(
        [
            {"labels": row["label"], **{name: row[name] for name in ("input_ids", "token_type_ids")}}
            for row in found.rows
        ]
    )
    batch = collate(found.rows)
    assert batch.keys() == theirs.keys()
    assert all(torch.equal(batch[name], theirs[name]) for name in batch)
    scores = read(tmp_path, [{"text": "ba", "label": 2.5}, {"text": "be", "label": 1}], number)
    labels = collate(scores.rows)["labels"]
    assert labels.dtype == torch.float32 and labels.tolist() == [2.5, 1.0]


def test_long_texts_lose_their_end_and_keep_their_frame(tmp_path: Path) -> None:
    found = read(tmp_path, [{"text": "ba be bi bo bu", "label": 0}, {"text": "ba", "label": 1}], seq_len=4)
    assert [words(row) for row in found.rows] == ["<s> ba be </s>", "<s> ba </s>"] and found.shortened == 1
    both = read(tmp_path, [{"text": "ba be bi bo", "text_pair": "bu", "label": 0}], seq_len=6).rows[0]
    assert words(both) == "<s> ba be </s> bu </s>" and len(both["token_type_ids"]) == 6
    with pytest.raises(UsageError, match="2 leaves no room beside this tokenizer's special tokens"):
        read(tmp_path, [{"text": "ba", "label": 0}], seq_len=2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "ba", "label": "sports"}, r"line 1: the model has no class 'sports'\. Did you mean 'sport'"),
        ({"text": "ba", "label": 3}, r"line 1: label 3, and the model's head has 3 classes, 0 to 2"),
        ({"text": "ba", "label": -1}, r"label -1, and the model's head has 3 classes"),
        ({"text": "ba", "label": "7"}, r"label 7, and the model's head has 3 classes"),
        ({"text": "ba", "label": 1.0}, r"'label' is 1\.0; it must be a class's name or its number"),
        ({"text": "ba", "label": True}, r"'label' is True; it must be"),
        ({"text": "ba", "label": None}, r"has no 'label'; its fields: text, label"),
        ({"text": "ba"}, r"has no 'label'; its fields: text\."),
        ({"label": 1}, r"has no text to classify: give 'text'.*its fields: label"),
        ({"text": " ", "label": 1}, r"'text' is empty"),
        ({"text": 3, "label": 1}, r"'text' is a int; it must be a string"),
        ({"text": "\ud800", "label": 1}, r"half of a surrogate pair"),
        (["ba", 1], r"line 1 is a list, not an object"),
    ],
)
def test_what_has_no_text_or_no_class_is_refused(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, [row])


def test_labels_that_could_be_two_classes(tmp_path: Path) -> None:
    stars = class_reader(("1", "2", "3"))
    assert read(tmp_path, [{"text": "ba", "label": "1"}], stars).rows[0]["label"] == 0
    with pytest.raises(
        DataError, match=r"label 1 could be the class of that number or the one of that name.* number 0"
    ):
        read(tmp_path, [{"text": "ba", "label": 1}], stars)
    with pytest.raises(DataError, match=r"Its config names none \(id2label is LABEL_0 \.\.\.\): give numbers, 0 to 1"):
        read(tmp_path, [{"text": "ba", "label": "news"}], class_reader(("LABEL_0", "LABEL_1")))


@pytest.mark.parametrize("label", ["many", "nan", float("inf"), True, [1]])
def test_what_is_no_number_is_refused_by_a_head_that_gives_one(tmp_path: Path, label: Any) -> None:
    with pytest.raises(DataError, match=r"line 1: 'label' is .*learns from finite numbers"):
        read(tmp_path, [{"text": "ba", "label": label}], number)


def test_tables_and_where_in_them_a_bad_record_stands(tmp_path: Path) -> None:
    table = tmp_path / "rows.tsv"
    table.write_text("sentence\tlabel\nba\tnews\nbe\t2\n")
    given: dict[str, Any] = {"seq_len": 8, "pad": 0, "arguments": ARGUMENTS}
    found = load_labelled(str(table), framed_tokenizer(), class_reader(NAMES), **given)
    assert [row["label"] for row in found.rows] == [0, 2]
    table.write_text("sentence\tlabel\nba\tnews\nbe\t\nbi\tbo\n")
    with pytest.raises(DataError, match=r"record 2 \(line 3\) has no 'label'.* Bad too: record 3 \(line 4\)\.$"):
        load_labelled(str(table), framed_tokenizer(), class_reader(NAMES), **given)


def test_other_bad_data(tmp_path: Path) -> None:
    cases: list[tuple[list[Any], type[NybbleError], str]] = [
        ([], DataError, "holds no record"),
        ([{"text": "ba", "label": 0}, {"text": "ba", "text2": "be", "label": 0}], DataError, "two texts in 1 of 2"),
    ]
    for rows, error, message in cases:
        with pytest.raises(error, match=message):
            read(tmp_path, rows)
    given: dict[str, Any] = {"seq_len": 8, "pad": 0, "arguments": ARGUMENTS}
    with pytest.raises(UsageError, match=r"data 'builtin' holds no records.*\.jsonl"):
        load_labelled("builtin", framed_tokenizer(), number, **given)
