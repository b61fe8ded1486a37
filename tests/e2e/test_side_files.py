"""What stands beside the weights goes along as it came, before the first block; who needs none of it isn't asked."""

from __future__ import annotations

import ast
import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.tiny import WORDS, save_text, save_tiny, tiny_model, tiny_tokenizer

import nybble
from nybble.core.errors import FileError
from nybble.core.files import need_space
from nybble.data import token_samples
from nybble.data.text import load_text
from nybble.models.sources.side_files import is_tokenizer_file, side_files
from nybble.pipelines.quantize import quantize
from nybble.pipelines.request import build_recipe

RTN = build_recipe("rtn", weights="int4 group=16")
REFUSED = '{"temperature":0.6,   "top_p": 0.9, "bos_token_id": 1, "eos_token_id": [2, 5]}'
"""Transformers reads it and would not write it: a temperature without do_sample."""
BESIDE = {
    "generation_config.json": REFUSED, "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}", "preprocessor_config.json": '{"size":  16}',
    "processor_config.json": "{ }", "source.spm": "spm", "LICENSE": "as you like",
}  # fmt: skip
LEFT = ("optimizer.pt", "training_args.bin", "modeling_mine.py", "README.md")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = save_tiny(tmp_path / "model")
    for name, text in BESIDE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name in LEFT:
        (folder / name).touch()
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("\n", "").replace("  ", ""))  # not as transformers writes it
    return folder


def test_bytes_are_the_sources(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(str(model), RTN, out=out)
    for name in (*BESIDE, "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes(), name
    assert not any((out / name).exists() and name != "README.md" for name in LEFT)
    assert (out / "README.md").read_bytes() != (model / "README.md").read_bytes()  # our own: how to load it
    assert transformers.GenerationConfig.from_pretrained(out).temperature == 0.6
    loaded, tokenizer = nybble.load(out)
    assert loaded.generation_config.eos_token_id == [2, 5] and tokenizer is not None
    assert tokenizer("ba")["input_ids"] == tiny_tokenizer()("ba")["input_ids"]
    nybble.save(loaded, tmp_path / "again", tokenizer)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "again").temperature == 0.6


def test_a_full_disk_is_found_before_the_first_block(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        with pytest.raises(FileError, match=r"LICENSE: the disk is full"):
            quantize(str(model), RTN, out=tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()  # nothing is finished
    quantize(str(model), RTN, out=tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "as you like"


def test_what_a_killed_run_left_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "part").write_bytes(bytes(60))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 950, 50))
    need_space(tmp_path / "out", 110)
    with pytest.raises(FileError, match="111 bytes are needed but 110 are free"):
        need_space(tmp_path / "out", 111)


def test_every_tokenizer_of_transformers() -> None:
    """The files that its classes name, read from their source: some can't be imported here."""
    names = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for text in re.findall(r"^VOCAB_FILES_NAMES = (\{.*?\})", path.read_text(encoding="utf-8"), re.M | re.S):
            names |= {name for name in ast.literal_eval(text).values() if name}
    assert len(names) > 15 and "spiece.model" in names
    assert [name for name in sorted(names) if not is_tokenizer_file(name)] == []


@pytest.mark.parametrize("broken", [False, True])
def test_no_tokenizer_is_needed(broken: bool, tmp_path: Path) -> None:
    """Neither to round nor with samples of the caller's own; what can't be read goes along all the same."""
    folder, data = save_tiny(tmp_path / "model"), save_text(tmp_path / "text.txt", 600)
    samples = token_samples(load_text(str(data), "calibration"), tiny_tokenizer(), samples=4, seq_len=16)
    for path in folder.glob("tokenizer*"):
        path.write_text("{") if broken else path.unlink()
    runs: list[tuple[Any, Any]] = [(RTN, "builtin"), (build_recipe("gptq", weights="int4"), samples)]
    for number, (recipe, given) in enumerate(runs):
        out = tmp_path / f"out{number}"
        quantize(str(folder), recipe, given, out=out)
        assert (out / "tokenizer.json").exists() == broken
        if broken:
            with pytest.warns(UserWarning, match=r"out\d comes without its tokenizer: .* can't be read"):
                loaded, tokenizer = nybble.load(out)
        else:
            loaded, tokenizer = nybble.load(out)
        assert tokenizer is None
        assert loaded(input_ids=torch.tensor([[3, len(WORDS) - 1]])).logits.isfinite().all()


def test_a_model_in_memory_with_such_settings(tmp_path: Path) -> None:
    quantized, _ = quantize(tiny_model(), RTN)
    quantized.generation_config.temperature = 0.6
    nybble.save(quantized, tmp_path / "out")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.6


def test_sentence_modules_are_followed_wherever_they_lie(tmp_path: Path) -> None:
    """Folders of any name, nested ones, a router's; pickles among them are named; nothing beside the model's folder."""
    folder = save_tiny(tmp_path / "model")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").touch()
    modules = {
        "": "Transformer", "./pooling": "Pooling", "modules/1_Mine": "Mine", "2_Dense": "Dense", "../outside": "Other",
    }  # fmt: skip
    listed = [{"idx": n, "name": str(n), "path": path, "type": kind} for n, (path, kind) in enumerate(modules.items())]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "router_config.json").write_text(json.dumps({"types": {"query_0_Pooling": "Pooling"}, "structure": {}}))
    carried = (
        "pooling/config.json", "modules/1_Mine/words/list.txt", "2_Dense/config.json", "query_0_Pooling/config.json",
        "language_model/5gram.bin", "alphabet.json", "qformer_tokenizer/vocab.txt", "head.safetensors",
        "decision_config.json",
    )  # fmt: skip
    for name in (*carried, "2_Dense/pytorch_model.bin", "pooling/modeling.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}")
    said: list[str] = []
    quantize(str(folder), RTN, out=tmp_path / "out", announce=said.append)
    assert any(line.startswith("left behind: 2_Dense/pytorch_model.bin, and 1 more (pickles and code") for line in said)
    for name in carried:
        assert (tmp_path / "out" / name).read_text() == name
    assert not list((tmp_path / "out").rglob("*.py")) and not (tmp_path / "out" / "2_Dense/pytorch_model.bin").exists()


def test_lists_of_modules_that_say_nothing(tmp_path: Path) -> None:
    for text in ("{", "3", "[3]", "null", '{"types": 3}', '[{"path": ""}]', '[{"path": "/etc"}]', '[{"path": ".."}]'):
        for name in ("modules.json", "router_config.json"):
            (tmp_path / name).write_text(text)
        assert set(side_files(tmp_path)) == {"modules.json", "router_config.json"}
