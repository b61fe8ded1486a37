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
FIRST = "{{ messages[0].content }}"
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
        ({"instruction": "ba", "output": "be"}, FIRST, DataError, "the chat template leaves message 2 out"),
    ],
)
def test_what_has_no_target_is_refused(
    tmp_path: Path, row: Any, template: str | None, error: type[NybbleError], message: str
) -> None:
    with pytest.raises(error, match=message):
        read(tmp_path, [row], template)


def test_tables_have_the_same_examples(tmp_path: Path) -> None:
    rows = [{"instruction": "ba, be", "input": "", "output": 'bi "bo"'}, {"instruction": "ba\nbe", "output": "bu"}]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = tmp_path / "rows.csv"
    table.write_text('instruction,input,output\n"ba, be",,"bi ""bo"""\n"ba\nbe",,bu\n')
    tabs = tmp_path / "rows.tsv"
    tabs.write_text('instruction\toutput\nba, be\t"bi ""bo"""\n"ba\nbe"\tbu\n')
    found = [load_examples(str(path), tiny_tokenizer(), seq_len=32).rows for path in (lines, table, tabs)]
    assert found[0] == found[1] == found[2] and len(found[0]) == 2


def test_every_bad_record_is_named_with_its_line(tmp_path: Path) -> None:
    good, bad = {"instruction": "ba", "output": "be"}, {"instruction": "ba", "output": ""}
    with pytest.raises(DataError, match=r"data.jsonl, line 2: 'output' is empty.* Bad too: line 4, line 5\.$"):
        read(tmp_path, [good, bad, good, {"question": "ba"}, {"messages": 1}])
    with pytest.raises(DataError, match=r"Bad too: line 2, line 3, line 4, line 5, line 6 and 2 more\.$"):
        read(tmp_path, [bad] * 8)
    table = tmp_path / "rows.csv"
    for text, message in [
        ('instruction,output\n"ba\nbe",be\nbi,\n', r"record 2 \(line 4\): 'output' is empty"),
        ("instruction,output\nba,be\nbi\n", r"record 2 \(line 3\): 'output' is a NoneType"),
        ("instruction,output\nba,be,bi\n", r"record 1 \(line 2\) has 3 fields for 2 columns. Put quotes"),
        ('instruction,output\nba,"be\n', "is no table"),
        ("question,answer\nba,be\n", r"record 1 \(line 2\) has neither 'messages'.*question, answer"),
        ("instruction,output\n", "holds no record"),
    ]:
        table.write_text(text)
        with pytest.raises(DataError, match=message):
            load_examples(str(table), tiny_tokenizer(), seq_len=32)


def test_other_bad_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no record"):
        read(tmp_path, [])
    with pytest.raises(UsageError, match="no token to predict"):
        read(tmp_path, [{"text": "ba"}], seq_len=1)
