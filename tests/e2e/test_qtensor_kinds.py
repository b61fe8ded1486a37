"""Models of Vector and Split tensors: quantized, saved, loaded by both loaders, generating; resumed; damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import input_ids, logits, save_text, save_tiny
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import nybble
from nybble.checkpoint.account import inspect
from nybble.checkpoint.parts import Parts
from nybble.core.errors import FileError
from nybble.nn.packed import Packed
from nybble.pipelines.quantize import quantize
from nybble.pipelines.request import build_recipe
from nybble.qtensor.split import SplitQTensor
from nybble.qtensor.vector import VectorQTensor
from nybble.walk.settings import Settings

KINDS: dict[str, tuple[type, str, dict[str, Any]]] = {
    "k-means": (VectorQTensor, "vector k=", {}),
    "k-means tied": (VectorQTensor, "vector k=", {"embeddings": "int2 channel"}),
    "outlier-columns": (SplitQTensor, "columns float16", {}),
    "outlier-columns of groups": (SplitQTensor, "columns float16", {"weights": "int3 group=8 scale_format=float16"}),
}
SETTINGS = Settings(samples=4, seq_len=12, batch=2)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama such as SmolLM2: tied, grouped queries."""
    made = tmp_path_factory.mktemp("kinds")
    save_tiny(made / "model", num_hidden_layers=3)
    save_text(made / "text.txt")
    return made


def run(folder: Path, name: str, out: Path, resume: bool = False) -> Any:
    recipe = build_recipe(name.split()[0], **KINDS[name][2])
    settings = Settings(samples=4, seq_len=12, batch=2, resume=resume)
    return quantize(folder / "model", recipe, str(folder / "text.txt"), out=out, settings=settings)[1]


def files(out: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file() and p.name != "times.json"
    }


def both(out: Path) -> tuple[Any, Any]:
    auto: Any = AutoModelForCausalLM
    return nybble.load(out)[0], auto.from_pretrained(out).eval()


@pytest.mark.parametrize("name", KINDS)
def test_saved_loaded_generating(folder: Path, tmp_path: Path, name: str) -> None:
    kind, line, _ = KINDS[name]
    report = run(folder, name, tmp_path / "out")
    memory, _ = quantize(
        folder / "model", build_recipe(name.split()[0], **KINDS[name][2]), str(folder / "text.txt"), settings=SETTINGS
    )
    stored = [row for row in report.layers if line in row.weights]
    assert len(stored) > len(report.layers) / 2  # the others fell back, and say so
    assert all(row.notes for row in report.layers if row not in stored)
    ours, theirs = both(tmp_path / "out")
    for model in (ours, theirs):
        tensors = [m.qtensor() for m in model.modules() if isinstance(m, Packed)]
        assert sum(type(tensor) is kind for tensor in tensors) == len(stored)
        assert torch.equal(logits(model), logits(memory))
    said = [m.generate(input_ids(), max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (ours, theirs)]
    assert torch.equal(*said) and said[0].shape == (2, 17)

    theirs.save_pretrained(tmp_path / "again")
    auto: Any = AutoModelForCausalLM
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "again")), logits(memory))
    found = inspect(tmp_path / "out")
    assert sum(found["bytes"].values()) == found["total"] and found["bytes"]["tables"] > 0
    for row in report.layers:
        weight = found["modules"].get(f"{row.name}.weight")
        assert weight is not None and weight["bits"] == row.bits


@pytest.mark.parametrize("name", ["k-means", "outlier-columns"])
def test_resumed(folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before each part is written: the same bytes as without a stop."""
    run(folder, name, tmp_path / "whole")
    write, left = Parts.write, 0

    class Stop(BaseException):
        pass

    def stopping(*args: Any, **kwargs: Any) -> None:
        nonlocal left
        if not left:
            raise Stop
        left -= 1
        write(*args, **kwargs)

    monkeypatch.setattr(Parts, "write", stopping)
    stops = 0
    while not (tmp_path / "out").exists():
        left = 1 if stops else 0
        try:
            run(folder, name, tmp_path / "out", resume=True)
        except Stop:
            stops += 1
    assert stops == 4  # before the first of three blocks, and after each
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "leaf", "message"),
    [
        ("k-means", "indices", "an index points to entry"),
        ("outlier-columns", "members", r"the parts of a split tensor have .* slices, and its index gives them"),
    ],
)
def test_damaged_values_are_named(folder: Path, tmp_path: Path, name: str, leaf: str, message: str) -> None:
    run(folder, name, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    sizes = {key.rpartition(".")[0]: len(t) for key, t in tensors.items() if key.endswith(".codebook")}
    key = next(k for k in tensors if k.endswith(f".{leaf}") and sizes.get(k.rpartition(".")[0], 0) != 256)
    tensors[key] = torch.full_like(tensors[key], 255 if leaf == "indices" else 1)
    if leaf == "indices":  # a book that doesn't fill its bits
        book = key.replace("indices", "codebook")
        tensors[book] = tensors[book][:-1].clone()
        shrink(tmp_path / "out" / "config.json", key.removesuffix(".weight.indices"))
    save_file(tensors, path, {"format": "pt"})
    auto: Any = AutoModelForCausalLM
    where = key.rpartition(".")[0].replace(".", r"\.")
    for load in (nybble.load, auto.from_pretrained):
        with pytest.raises(FileError, match=rf"{where}: .*{message}"):
            load(tmp_path / "out")


def shrink(path: Path, module: str) -> None:
    """Let config.json describe a code book of one entry less, for this module alone."""
    config = json.loads(path.read_text())
    quantization = config["quantization_config"]
    entry = quantization["modules"][module]
    layout = json.loads(json.dumps(quantization["layouts"][entry["weight"]]))
    layout["tensors"]["codebook"][1][0] -= 1
    entry["weight"] = len(quantization["layouts"])
    quantization["layouts"].append(layout)
    path.write_text(json.dumps(config))
