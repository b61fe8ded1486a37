"""Records to examples: which tokens the loss looks at, what is cut, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import WORDS, tiny_tokenizer

from nybble.core.errors import DataError, NybbleError, UsageError
from nybble.data.instructions import Examples, collate, load_examples, prompt_of
from nybble.data.pairs import IGNORED

TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m.role + ' ' + m.content + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)
BACKWARDS = "{% for m in messages | reverse %}{{ m.content + ' ' }}{% endfor %}"


def read(folder: Path, rows: list[Any], template: str | None = None, seq_len: int = 32) -> Examples:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(str(path), tokenizer, seq_len=seq_len)


def said(found: Examples, number: int = 0, targets: bool = True) -> str:
    """The words of an example, or those of them that are targets."""
    row = found.rows[number]
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    assert all(label in (IGNORED, token) for token, label in pairs)
    return " ".join(WORDS[t] for t in (row["labels"] if targets else row["input_ids"]) if t != IGNORED)


def test_of_a_pair_the_output_and_its_end_are_targets(tmp_path: Path) -> None:
    found = read(tmp_path, [{"instruction": "ba be", "input": "bi", "output": "bo bu"}])
    assert said(found, targets=False) == "ba be bi bo bu </s>"
    assert said(found) == "bo bu </s>" and found.targets == 3


def test_of_a_chat_every_answer_is_a_target_and_a_pair_is_a_chat(tmp_path: Path) -> None:
    chat = [("user", "ba"), ("assistant", "be bi"), ("user", "bo"), ("assistant", "bu")]
    rows = [{"messages": [{"role": r, "content": c} for r, c in chat]}, {"prompt": "ba", "completion": "be"}]
    found = read(tmp_path, rows, TEMPLATE)
    assert said(found, targets=False) == "<s> <unk> ba </s> <s> <unk> be bi </s> <s> <unk> bo </s> <s> <unk> bu </s>"
    assert said(found) == "be bi </s> bu </s>"
    assert said(found, 1) == "be </s>" and said(found, 1, targets=False).startswith("<s> <unk> ba </s> <s>")


def test_text_is_all_target_in_pieces(tmp_path: Path) -> None:
    found = read(tmp_path, [{"text": "ba be bi bo bu"}], seq_len=4)
    assert [said(found, i) for i in range(2)] == ["ba be bi bo", "bu </s>"]
    plain = tmp_path / "a.txt"
    plain.write_text("ba be bi bo bu")
    assert load_examples(str(plain), tiny_tokenizer(), seq_len=4).rows == found.rows


def test_long_examples_lose_their_end_or_are_left_out(tmp_path: Path) -> None:
    rows = [{"instruction": "ba be", "output": "bi bo"}, {"instruction": "ba be bi bo", "output": "bu"}]
    found = read(tmp_path, rows, seq_len=4)
    assert said(found) == "bi bo" and (found.shortened, found.left_out, len(found.rows)) == (1, 1, 1)
    with pytest.raises(DataError, match=r"no example whose target begins within 2 tokens \(2 are longer\)"):
        read(tmp_path, rows, seq_len=2)


def test_a_batch_is_padded_where_nothing_looks(tmp_path: Path) -> None:
    found = read(tmp_path, [{"instruction": "ba", "output": "be"}, {"instruction": "ba be", "output": "bi bo"}])
    batch = collate(list(found.rows))
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"][0, 3:].tolist() == [IGNORED] * 2
    assert prompt_of(found.rows[1]) == found.rows[1]["input_ids"][:2]


@pytest.mark.parametrize(
    ("row", "template", "error", "message"),
    [
        ({"instruction": "ba", "output": " "}, None, DataError, "line 1: 'output' is empty, so there is no target"),
        ({"instruction": "ba", "output": None}, None, DataError, "'output' is a NoneType"),
        ({"question": "ba"}, None, DataError, "neither 'messages', nor 'instruction' and 'output'.*question"),
        ({"text": " "}, None, DataError, "the text is empty"),
        ({"messages": [{"role": "user", "content": "ba"}]}, TEMPLATE, DataError, "no message is of the assistant"),
        ({"messages": [{"role": "assistant", "content": ""}]}, TEMPLATE, DataError, "message 1.* is empty"),
        ({"messages": [{"role": "user", "content": "ba"}]}, None, DataError, "no chat template"),
        ({"instruction": "ba", "output": "be"}, BACKWARDS, DataError, "in another way than its beginning"),
    ],
)
def test_what_has_no_target_is_refused(
    tmp_path: Path, row: Any, template: str | None, error: type[NybbleError], message: str
) -> None:
    with pytest.raises(error, match=message):
        read(tmp_path, [row], template)


def test_other_bad_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no record"):
        read(tmp_path, [])
    with pytest.raises(UsageError, match="no token to predict"):
        read(tmp_path, [{"text": "ba"}], seq_len=1)
