"""Sources of text: what is read, what is refused, and that builtin's two parts share nothing."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tests.parts.data.tiny import tiny_tokenizer

from nybble.core.errors import DataError, FileError, UsageError
from nybble.data import Part, load_text, make_source
from nybble.data.sources.builtin import split_topics
from nybble.pipelines.generate import generate

PARTS: tuple[Part, ...] = ("calibration", "evaluation")


def long_paragraphs(documents: tuple[str, ...]) -> set[str]:
    blocks = (" ".join(block.split()) for document in documents for block in document.split("\n\n"))
    return {block for block in blocks if len(block) >= 80}


def test_builtin_parts_share_no_paragraph_and_are_of_like_size() -> None:
    first, second = (load_text("builtin", part) for part in PARTS)
    assert long_paragraphs(first.documents)
    assert not long_paragraphs(first.documents) & long_paragraphs(second.documents)
    sizes = [sum(map(len, source.documents)) for source in (first, second)]
    assert min(sizes) > 0.4 * sum(sizes)
    assert min(sizes) > 120_000
    assert first.sha256 != second.sha256
    assert first.sha256 == load_text("builtin", "calibration").sha256
    assert "calibration part" in first.note


def test_topics_that_overlap_stay_together_and_contained_ones_go() -> None:
    shared, inner = "s" * 70, "i" * 90
    topics = {
        "chapter": f"{'a' * 200}\n\n{inner}\n\n{shared}",
        "inside": f"short\n\n   {inner}",
        "cousin": f"{shared}\n\n{'b' * 300}",
        "alone": "c" * 500,
        "other": "d" * 100,
    }
    assert split_topics(topics) == {"calibration": ["chapter", "cousin"], "evaluation": ["alone", "other"]}


def test_text_file_is_one_document_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes("one\r\n\r\ntwo é\n".encode())
    source = load_text(str(path), "calibration")
    assert source.documents == ("one\r\n\r\ntwo é\n",)
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert source == load_text(str(path), "evaluation")
    assert "the same for calibration and evaluation" in source.note


def test_file_without_an_ending_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("corpus").write_text("words", encoding="utf-8")
    assert load_text("corpus", "calibration").documents == ("words",)


def test_jsonl_text_and_messages(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"text": "a\\u2028b \u2028 c"}\n\n{"messages": [{"role": "user", "content": "hi"}]}\n{"text": " "}',
        encoding="utf-8",
    )
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert load_text(str(path), "calibration", tokenizer).documents == ("a\u2028b \u2028 c", "<user>hi")


ROWS = [{"text": "one"}, {"text": "two \u2028 \U0001f600"}]
LINES = "\n".join(map(json.dumps, ROWS))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.JSONL", LINES), ("a.ndjson", LINES), ("a.json", LINES), ("a.Json", json.dumps(ROWS)),
        ("a.json", "\ufeff" + json.dumps(ROWS, indent=1)), ("a.json", json.dumps({"version": 1, "data": ROWS})),
        ("a.json", json.dumps([row["text"] for row in ROWS])), ("a.jsonl", "\ufeff" + LINES + "\n"),
        ("a.CSV", 'id,text\n1,one\n2,"two \u2028 \U0001f600"\n'),
        ("a.tsv", "text\tid\none\t1\ntwo \u2028 \U0001f600\t2"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("pack", ["", "gz", "bz2", "XZ"])
def test_records_are_told_by_the_ending_in_any_case_packed_or_not(
    tmp_path: Path, name: str, content: str, pack: str
) -> None:
    path = tmp_path / (f"{name}.{pack}" if pack else name)
    packers: dict[str, Any] = {"": bytes, "gz": gzip.compress, "bz2": bz2.compress, "XZ": lzma.compress}
    path.write_bytes(packers[pack](content.encode()))
    assert load_text(str(path), "calibration").documents == ("one", "two \u2028 \U0001f600")


def test_one_json_object_is_one_record(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"text": "one", "tags": ["x"]}), encoding="utf-8")
    assert load_text(str(path), "calibration").documents == ("one",)


def test_packed_text_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt.gz"
    path.write_bytes(gzip.compress(b"one\r\ntwo"))
    assert load_text(str(path), "calibration").documents == ("one\r\ntwo",)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(FileError, match="can't be unpacked"):
        load_text(str(path), "calibration")


@pytest.mark.parametrize("begins", [b"PAR1", b"PK\x03\x04", b"%PDF", b"\x28\xb5\x2f\xfd"])
def test_files_that_are_no_text_are_named(tmp_path: Path, begins: bytes) -> None:
    path = tmp_path / "a.dat"
    path.write_bytes(begins + b" and more")
    with pytest.raises(DataError, match=r"is (a|an|packed by) .*JSONL"):
        load_text(str(path), "calibration")


@pytest.mark.parametrize("content", ['{"text": "a \\ud800 b"}', '{"messages": [{"role": "u", "content": "\\udc00"}]}'])
def test_half_a_surrogate_pair_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}\n' + content, encoding="utf-8")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"line 2 holds U\+D[8C]00 at character"):
        load_text(str(path), "calibration", tokenizer)
    with pytest.raises(DataError, match=r"data 'mine', document 2 holds U\+D800 at character 1"):
        make_source(["good", "a\ud800"], name="mine", note="")
    with pytest.raises(DataError, match=r"the prompt holds U\+DCFF"):
        generate("demo:smollm2", "caf\udcff")


def test_a_table_without_text_names_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,body\n1,one", encoding="utf-8")
    with pytest.raises(DataError, match=r"record 1 \(line 2\) has neither 'text' nor 'messages'; its fields: id, body"):
        load_text(str(path), "calibration")
    path.write_text("text\n" + "x" * 200_000, encoding="utf-8")
    assert len(load_text(str(path), "calibration").documents[0]) == 200_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("[" * 100_000, "line 1 is not JSON"),
        ('{"text": "a"}\n\n{"body": "a", "id": 1}', "line 3 has neither 'text' nor 'messages'; its fields: body, id"),
        ("{}", "its fields: none"),
        ('["text"]', "line 1 is a list, not an object"),
        ('{"text": 3}', "'text' is a int; it must be a string"),
        ('{"messages": "hi"}', "'messages' is a str; it must be a list"),
        ('{"messages": []}', "no tokenizer was given"),
        ('{"text": ""}\n', "holds no text"),
        ("", "holds no text"),
    ],
)
def test_jsonl_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_text(str(path), "calibration")


def test_messages_need_a_template_that_takes_them(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}', encoding="utf-8")
    tokenizer = tiny_tokenizer()
    with pytest.raises(DataError, match="has no chat template"):
        load_text(str(path), "calibration", tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="line 1: the chat template refuses these messages: roles must alternate"):
        load_text(str(path), "calibration", tokenizer)
    path.write_text('{"messages": ["hi"]}', encoding="utf-8")
    with pytest.raises(DataError, match="each of 'messages' must be an object"):
        load_text(str(path), "calibration", tokenizer)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"one\ncaf\xe9 noir")
    with pytest.raises(DataError, match=r"not UTF-8: byte 0xe9 at offset 7 \(line 2\)"):
        load_text(str(path), "calibration")


def test_empty_text_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(" \n", encoding="utf-8")
    with pytest.raises(DataError, match="holds no text"):
        load_text(str(path), "calibration")


@pytest.mark.parametrize("name", ["nosuch.txt", "nosuch.jsonl", "./nosuch", "a/b/c"])
def test_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match="does not exist"):
        load_text(name, "calibration")


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is a folder"):
        load_text(str(tmp_path), "calibration")


def test_unknown_part_and_unknown_kind() -> None:
    with pytest.raises(UsageError, match="Did you mean 'calibration'"):
        load_text("builtin", "calibrate")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="is no text file"):
        load_text("what is this", "calibration")


def test_hub_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"nybble\[hub\].*Did you mean 'builtin'"):
        load_text("bultin", "calibration")


def fake_datasets(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> Any:
        calls.append((name, config, split))
        if isinstance(answer, Exception):
            raise answer
        return answer

    module = types.ModuleType("datasets")
    monkeypatch.setattr(module, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hub_id_with_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_datasets(monkeypatch, [{"text": "a"}, {"text": ""}, {"text": "b"}])
    assert load_text("owner/set:raw-v1:test", "calibration").documents == ("a", "b")
    assert load_text("owner/set", "evaluation").note == (
        "split train of the hub data set owner/set, the same for calibration and evaluation"
    )
    assert load_text("set::validation", "evaluation").name == "set::validation"
    assert calls == [("owner/set", "raw-v1", "test"), ("owner/set", None, "train"), ("set", None, "validation")]


def test_hub_that_fails_says_what_came(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, ConnectionError("no route"))
    with pytest.raises(DataError, match=r"'owner/set' .*ConnectionError: no route.*'builtin'"):
        load_text("owner/set", "calibration")
    fake_datasets(monkeypatch, [{"text": "a"}, {"label": 1}])
    with pytest.raises(DataError, match="owner/set, record 2 has neither"):
        load_text("owner/set", "calibration")
