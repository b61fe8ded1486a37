"""Others' quantized folders in every command that takes a model: inspect, eval, quantize, export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.parts.models.layouts import (
    test_awq,
    test_bitsandbytes,
    test_compressed_tensors,
    test_gptq,
    test_mlx,
    test_modelopt,
)
from tests.parts.models.layouts.peers import llama, write
from tests.tiny import logits, save_text
from torch import Tensor

import nybble
from nybble.checkpoint.account import inspect
from nybble.core.errors import ModelError
from nybble.pipelines.evaluate import run_eval
from nybble.pipelines.export import export
from nybble.pipelines.quantize import quantize
from nybble.pipelines.request import build_recipe

CT = test_compressed_tensors.CASES
MADE: dict[str, Callable[[Path], tuple[Path, dict[str, Tensor]]]] = {
    "compressed-tensors": lambda p: test_compressed_tensors.checkpoint(p / "q", *CT["pack int4 zeros"]),
    "bitsandbytes": lambda p: test_bitsandbytes.checkpoint(p, test_bitsandbytes.CASES["nf4 nested"]),
    "gptq": lambda p: test_gptq.checkpoint(p / "q", 4, 32),
    "awq": lambda p: test_awq.checkpoint(p / "q", 32),
    "modelopt": lambda p: test_modelopt.checkpoint(p / "q", "NVFP4", apart=True),
    "mlx": lambda p: test_mlx.checkpoint(p / "q", "mixed"),
}


FORMATS = {
    "compressed-tensors": "int4_full group=32 scale_format=bfloat16",
    "bitsandbytes": "nf4 flat=64 scale_format=(dynamic8 flat=256)",
    "gptq": "uint4 group=32 scale_format=float16",
    "awq": "uint4 group=32 scale_format=float16",
    "modelopt": "float4_e2m1fn group=16 scale_format=(float8_e4m3fn tensor)",
    "mlx": "uint3 group=32 scale_format=bfloat16",
}


@pytest.mark.parametrize("name", MADE)
def test_inspected_to_the_byte(name: str, tmp_path: Path) -> None:
    folder, wanted = MADE[name](tmp_path)
    found = inspect(folder)
    assert found["total"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert found["modules"].keys() == wanted.keys()
    assert found["quantized_parameters"] == sum(value.numel() for value in wanted.values())
    assert 4 < found["bits_per_quantized_weight"] < 6.5
    assert FORMATS[name] in {row["format"] for row in found["formats"]}
    assert sum(row["elements"] for row in found["formats"]) == found["quantized_parameters"]
    assert sum(found["bytes"].values()) == found["total"] and found["bytes"]["codes"] > found["bytes"]["scales"]


@pytest.mark.parametrize("name", MADE)
def test_quantized_again_from_their_values(name: str, tmp_path: Path) -> None:
    folder, wanted = MADE[name](tmp_path)
    quantize(str(folder), build_recipe("rtn", weights="int8_full channel"), out=tmp_path / "again")
    model, tokenizer = nybble.load(tmp_path / "again")
    assert tokenizer is not None and json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
    for key, value in wanted.items():
        if "embed" in key:  # MLX packs it too, and it is in float again
            assert torch.equal(model.get_parameter(key).data, value.bfloat16())
            continue
        layer: Any = model.get_submodule(key.removesuffix(".weight"))
        found = layer.weight(torch.float32)
        assert 0 < (found - value.float()).abs().max() < 0.02 * value.float().abs().max()


def test_evaluated(tmp_path: Path) -> None:
    folder, _ = MADE["compressed-tensors"](tmp_path)
    text = save_text(tmp_path / "text.txt")
    found = run_eval({"it": str(folder)}, str(text), seq_len=16, samples=2)
    assert 1 < found["models"]["it"]["ppl"] < 1e9


@pytest.mark.parametrize("case", ["pack int4 zeros", "pack int3", "fp8 channel", "nvfp4", "mxfp4", "pack block"])
def test_there_and_back_keeps_every_byte(case: str, tmp_path: Path) -> None:
    form, args = CT[case]
    folder, _ = test_compressed_tensors.checkpoint(tmp_path / "q", form, args)
    export(folder, tmp_path / "back", "compressed-tensors")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype
        assert torch.equal(value.reshape(-1).view(torch.uint8), after[key].reshape(-1).view(torch.uint8)), key


def test_gptq_becomes_compressed_tensors(tmp_path: Path) -> None:
    folder, wanted = MADE["gptq"](tmp_path)
    export(folder, tmp_path / "ct", "compressed-tensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ct", "q"]
    a: Any
    b: Any
    a, b = nybble.load(folder, dtype="float16")[0], nybble.load(tmp_path / "ct", dtype="float16")[0]
    assert torch.equal(logits(a), logits(b))
    key = "model.layers.0.mlp.up_proj"
    assert torch.equal(b.get_submodule(key).weight(torch.float16), wanted[f"{key}.weight"])


def test_the_float_model_of_nf4_is_written(tmp_path: Path) -> None:
    folder, wanted = MADE["bitsandbytes"](tmp_path)
    export(folder, tmp_path / "dense", "dense:float32")
    found = load_file(tmp_path / "dense/model.safetensors")
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_rounded_weights_in_float_are_for_no_target_of_packed_ones(tmp_path: Path) -> None:
    """Of compressed-tensors' format dense."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "channel"}}
    said = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {"group_0": group}}
    model = llama()
    write(tmp_path / "q", model, model.state_dict(), said)
    with pytest.raises(ModelError, match="has its weights in float"):
        export(tmp_path / "q", tmp_path / "no", "compressed-tensors")
    export(tmp_path / "q", tmp_path / "dense", "dense")
    assert not (tmp_path / "no").exists()


def test_saved_as_nybbles_own(tmp_path: Path) -> None:
    folder, wanted = MADE["gptq"](tmp_path)
    model, _ = nybble.load(folder, dtype="float16")
    nybble.save(model, tmp_path / "own")
    again: Any = nybble.load(tmp_path / "own")[0]
    assert torch.equal(logits(model), logits(again))
    assert all(torch.equal(again.get_submodule(k[:-7]).weight(torch.float16), v) for k, v in wanted.items())
