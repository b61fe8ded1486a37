"""ModelOpt by formulas in torch's own dtypes; compressed-tensors unpacks the codes of NVFP4.

Its own files are read, and judged by its own dequantizers, in ``tests/parts/export/test_modelopt.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from safetensors.torch import load_file, save_file
from tests.parts.models.layouts.peers import linears, llama, swapped, write
from tests.tiny import logits
from torch import Tensor

import nybble
from nybble.core.errors import FileError, ModelError
from nybble.models.sources.open import open_source
from nybble.nn.packed import Packed

KINDS = ("NVFP4", "MXFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "W8A8_SQ_PER_CHANNEL", "MXFP8")


def layer(kind: str, rows: int, columns: int, g: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors, and the float32 values that they stand for."""
    per_row = torch.rand(rows, generator=g) * 0.01 + 1e-3
    if kind.endswith("FP4"):
        size = 16 if kind == "NVFP4" else 32
        weight = torch.randint(0, 256, (rows, columns // 2), generator=g, dtype=torch.uint8)
        codes = unpack_fp4_from_uint8(weight, rows, columns, dtype=torch.float32).view(rows, -1, size)
        if kind == "MXFP4":
            exponents = torch.randint(118, 124, (rows, columns // size), generator=g, dtype=torch.uint8)
            return {"weight": weight, "weight_scale": exponents}, torch.ldexp(
                codes, exponents.int()[..., None] - 127
            ).flatten(1)
        scale = (torch.rand(rows, columns // size, generator=g) * 200 + 1).to(torch.float8_e4m3fn)
        outer = torch.tensor(0.9 / (6 * 448))
        values = (codes * (scale.float() * outer)[..., None]).flatten(1)
        return {"weight": weight, "weight_scale": scale, "weight_scale_2": outer, "input_scale": outer}, values
    if kind.startswith("W8A8"):
        code = torch.randint(-128, 128, (rows, columns), generator=g, dtype=torch.int8)
        return {"weight": code, "weight_scale": per_row}, code.float() * per_row[:, None]
    fp8 = (torch.randn(rows, columns, generator=g) * 100).to(torch.float8_e4m3fn)
    if kind == "MXFP8":
        exponents = torch.randint(112, 118, (rows, columns // 32), generator=g, dtype=torch.uint8)
        each = torch.ldexp(fp8.float().view(rows, -1, 32), exponents.int()[..., None] - 127)
        return {"weight": fp8, "weight_scale": exponents}, each.flatten(1)
    if kind == "FP8":
        return {"weight": fp8, "weight_scale": per_row[0].clone()}, fp8.float() * per_row[0]
    return {"weight": fp8, "weight_scale": per_row}, fp8.float() * per_row[:, None]


def checkpoint(folder: Path, kind: str, *, apart: bool = False) -> tuple[Path, dict[str, Tensor]]:
    """A folder; ``apart``: described in hf_quant_config.json alone, as older versions do."""
    model, g = llama(torch.float32), torch.Generator().manual_seed(0)
    made, values = {}, {}
    for name, module in linears(model).items():
        made[name], values[f"{name}.weight"] = layer(kind, module.out_features, module.in_features, g)
    said = {"quant_method": "modelopt", "quant_algo": kind, "ignore": ["lm_head"]}
    write(folder, model, swapped(model, made), None if apart else said)
    if apart:
        older = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": kind, "kv_cache_quant_algo": "FP8"}}
        (folder / "hf_quant_config.json").write_text(json.dumps(older))
    return folder, values


@pytest.mark.parametrize("kind", KINDS)
def test_values(kind: str, tmp_path: Path) -> None:
    folder, wanted = checkpoint(tmp_path / "q", kind, apart=kind == "FP8")
    source: Any = open_source(str(folder))
    found = source.load(list(wanted))
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key
    rounds = kind in ("NVFP4", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8")  # as nybble can; the others ask for what it can't
    assert ("rounds activations" if rounds else "quantized activations") in source.note
    assert ("KV cache" in source.note) == (kind == "FP8")


def test_a_model_keeps_them_packed(tmp_path: Path) -> None:
    folder, wanted = checkpoint(tmp_path / "q", "NVFP4")
    path = folder / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if not name.endswith("input_scale")}
    save_file(weights, path, {"format": "pt"})
    with pytest.warns(UserWarning, match="quantized activations too"):
        model, _ = nybble.load(folder, dtype="float32")
    plain = llama(torch.float32)
    for key, value in wanted.items():
        assert isinstance(model.get_submodule(key.removesuffix(".weight")).weight, Packed)
        plain.get_parameter(key).data.copy_(value)
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("place", ["hf_quant_config", "config", "groups", "layers"])
def test_groups_of_another_size_are_refused(place: str, tmp_path: Path) -> None:
    """Wherever the checkpoint says it."""
    folder, _ = checkpoint(tmp_path / "q", "NVFP4", apart=place == "hf_quant_config")
    path = folder / ("hf_quant_config.json" if place == "hf_quant_config" else "config.json")
    for size in (16, 32):
        raw = json.loads(path.read_text())
        said = raw["quantization" if place == "hf_quant_config" else "quantization_config"]
        if place == "groups":
            said["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": {"group_size": size}}}
        elif place == "layers":
            layers = [f"model.layers.0.mlp.{part}_proj" for part in ("up", "down")]
            said["quantized_layers"] = {name: {"quant_algo": "NVFP4", "group_size": size} for name in layers}
        else:
            said["group_size"] = size
        path.write_text(json.dumps(raw))
        if size == 16:
            open_source(str(folder))
            continue
        with pytest.raises(FileError, match=r"says group_size 32, and \S+weight_scale \[\d+, \d+\] is of groups of 16"):
            open_source(str(folder))


def test_bad_ones_are_refused(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "q", "NVFP4")
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.0.mlp.up_proj."
    cases: list[tuple[dict[str, Tensor | None], type[Exception], str]] = [
        ({f"{key}weight_scale": None}, FileError, "weight_scale"),
        ({f"{key}weight_scale_2": None}, FileError, "weight_scale_2"),
        ({f"{key}weight": tensors[f"{key}weight"][:, :-8].clone()}, FileError, "weight_scale"),
        ({f"{key}weight_scale": torch.ones(96)}, FileError, "weight_scale"),
        ({f"{key}pre_quant_scale": torch.ones(63)}, FileError, "pre_quant_scale"),
        ({f"{key}svdquant_lora_a": torch.ones(4, 64)}, ModelError, "svdquant_lora_a"),
    ]
    for change, error, text in cases:
        save_file({n: t for n, t in {**tensors, **change}.items() if t is not None}, folder / "model.safetensors")
        with pytest.raises(error, match=text):
            open_source(str(folder))
