"""Damaged checkpoints of every layout: the model, or an error of nybble's own; never anything else."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.parts.models.layouts import (
    test_awq,
    test_bitsandbytes,
    test_compressed_tensors,
    test_gptq,
    test_mlx,
    test_modelopt,
    test_mxfp4,
)
from torch import Tensor

from nybble.core.errors import NybbleError
from nybble.core.tensorheader import TensorEntry, read_tensor_header
from nybble.models.named import stated_quantization
from nybble.models.sources.layouts import Files, packed_weights
from nybble.models.sources.open import open_source

CT = test_compressed_tensors.CASES
MADE: dict[str, Callable[[Path], Path]] = {
    "packed integers": lambda p: test_compressed_tensors.checkpoint(p / "q", *CT["pack int3 zeros"])[0],
    "nvfp4": lambda p: test_compressed_tensors.checkpoint(p / "q", *CT["nvfp4"])[0],
    "int8": lambda p: test_compressed_tensors.checkpoint(p / "q", *CT["int8 zeros"])[0],
    "bitsandbytes": lambda p: test_bitsandbytes.checkpoint(p, test_bitsandbytes.CASES["nf4 nested"])[0],
    "llm.int8": lambda p: test_bitsandbytes.checkpoint(p, test_bitsandbytes.CASES["int8"])[0],
    "gptq": lambda p: test_gptq.checkpoint(p / "q", 4, 32, order=True)[0],
    "awq": lambda p: test_awq.checkpoint(p / "q", 32)[0],
    "mxfp4": lambda p: test_mxfp4.checkpoint(p / "q")[0],
    "modelopt": lambda p: test_modelopt.checkpoint(p / "q", "NVFP4")[0],
    "mlx": lambda p: test_mlx.checkpoint(p / "q", "mixed")[0],
}
ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    3,
    1 << 62,
    1e400,
    "",
    "group",
    "re:(",
    [],
    [[]],
    {},
    {"a": 1},
    float("nan"),
)
DTYPES = (torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float8_e4m3fn)
NAMES = {
    torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.float16: "F16",
    torch.uint32: "U32", torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
ROUNDS = 140
"""Of each layout: more than a thousand in all."""


def _spoil(value: Any, r: random.Random) -> Any:
    """A JSON value with one place in it changed."""
    if isinstance(value, dict) and value and r.random() < 0.85:
        key = r.choice(list(value))
        if r.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: _spoil(value[key], r)}
    if isinstance(value, list) and value and r.random() < 0.8:
        place = r.randrange(len(value))
        return [_spoil(v, r) if i == place else v for i, v in enumerate(value)]
    return r.choice(ODD)


def _damage(tensors: dict[str, Tensor], r: random.Random) -> dict[str, Tensor]:
    """One tensor missing, renamed, of another dtype or shape, cut, or with other bytes."""
    found = dict(tensors)
    name = r.choice(list(found))
    tensor = found.pop(name)
    how = r.randrange(6)
    if how == 0:
        return found
    if how == 1:
        return {**found, name + r.choice(("x", ".weight", "_scale")): tensor}
    if how == 2:
        return {**found, name: tensor.reshape(-1).view(torch.uint8).clone().to(r.choice(DTYPES))}
    if how == 3:
        return {**found, name: tensor.reshape(-1).clone() if r.random() < 0.5 else tensor[None].clone()}
    if how == 4 and tensor.ndim:
        return {**found, name: tensor.narrow(r.randrange(tensor.ndim), 0, r.randrange(2)).clone()}
    data = tensor.clone().reshape(-1)
    raw = data.view(torch.uint8)
    for _ in range(8):
        raw[r.randrange(len(raw))] = r.randrange(256)
    return {**found, name: data.reshape(tensor.shape)}


def _read(quantization: Any, tensors: dict[str, Tensor]) -> None:
    entries = {
        n: TensorEntry(dtype=NAMES[t.dtype], shape=tuple(t.shape), begin=0, nbytes=t.nbytes) for n, t in tensors.items()
    }
    found, _ = packed_weights(quantization, Files("a test", entries, tensors.__getitem__))
    for weight in found.values():
        assert weight.values(tensors.__getitem__).shape == weight.shape


@pytest.mark.parametrize("name", MADE)
def test_nothing_but_own_errors(name: str, tmp_path: Path) -> None:
    folder, r = MADE[name](tmp_path), random.Random(name)
    config = stated_quantization(folder, json.loads((folder / "config.json").read_text()))
    tensors = load_file(folder / "model.safetensors")
    keep = ("layers.0.mlp.up_proj", "layers.0.mlp.experts", "layers.0.self_attn.q_proj")
    tensors = {n: t for n, t in tensors.items() if any(part in n for part in keep)}
    _read(config, tensors)
    refused = 0
    for _ in range(ROUNDS):
        changed = r.random() < 0.4
        try:
            _read(_spoil(copy.deepcopy(config), r) if changed else config, tensors if changed else _damage(tensors, r))
        except NybbleError as error:
            refused += 1
            assert len(str(error)) > 20
    assert refused > ROUNDS // 4


@pytest.mark.parametrize("name", ["packed integers", "bitsandbytes", "gptq", "mxfp4"])
def test_whole_folders(name: str, tmp_path: Path) -> None:
    """Through the files: damaged tensors, then bytes of the header and a cut end."""
    folder, r = MADE[name](tmp_path), random.Random(name)
    path = folder / "model.safetensors"
    tensors, whole = load_file(path), path.read_bytes()
    start = read_tensor_header(path).data_start
    refused = 0
    for i in range(24):
        if i % 3:
            save_file(_damage(tensors, r), path)
        elif i % 2:
            path.write_bytes(whole[: r.randrange(len(whole))])
        else:
            place = r.randrange(start)
            path.write_bytes(whole[:place] + bytes([r.randrange(256)]) + whole[place + 1 :])
        try:
            source = open_source(str(folder))
            source.load(source.tensor_names())
        except NybbleError:
            refused += 1
    assert refused > 6
