"""Kernels with instructions that no interpreter has, as Triton compiles them for a GPU that isn't there."""

from __future__ import annotations

import dataclasses
import importlib
from functools import partial
from typing import Any

import pytest
import torch
import triton
from tests.parts.kernels.test_gpu_products import compile_for_hopper, packed

from nybble.kernels._gpu_weights import Weight, weight_of


@pytest.mark.parametrize(
    "line", ["int4 group=128 symmetric=false", "q4_k", "nvfp4", "nf4-dq", "int3 group=64", "e2m1 channel"]
)
def test_triton_compiles_products_of_packed_weights(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compiler refuses what its interpreter runs."""
    gpu = importlib.import_module("nybble.kernels.cuda_products")
    assert not gpu.INTERPRETED
    monkeypatch.setattr(
        triton.runtime.jit.JITFunction, "__getitem__", lambda self, grid: partial(compile_for_hopper, self)
    )
    record = weight_of(packed(line, 64, 1024))
    assert isinstance(record, Weight)
    bias = torch.zeros(64).bfloat16()
    for rows in (1, 20):
        gpu.multiply(torch.zeros(rows, 1024).bfloat16(), record, bias, gpu.tile_of(record, rows))
    gpu.expand(record, torch.bfloat16, 0, 64)
    gpu.expand(dataclasses.replace(record, k=1022), torch.bfloat16, 0, 64)


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [("nvfp4", "nvfp4"), ("float4_e2m1fn channel", "int8 token"), ("fp4-m2", "float8_e4m3fn token")],
)
def test_triton_compiles_two_rounded_operands(weights: str, inputs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the instructions of their own that no interpreter has."""
    gpu, tiles = (importlib.import_module(f"nybble.kernels.{name}") for name in ("gpu_quantized", "_gpu_tiles"))
    operands, rows = (importlib.import_module(f"nybble.kernels.{name}") for name in ("_gpu_operands", "gpu_quantizers"))
    assert not tiles.INTERPRETED
    monkeypatch.setattr(
        triton.runtime.jit.JITFunction, "__getitem__", lambda self, grid: partial(compile_for_hopper, self)
    )
    record = operands.plan(packed(weights, 64, 256))
    way = gpu.route(record, inputs, 20)
    codes = torch.zeros(2, 20, 128).to(operands.DOT_DTYPES[way.dot])
    scale, by, factor = record.on(way.dot)
    x = rows.Rows(codes, torch.ones(1))
    tiles._inside(x, record, way.dot, way.promote, scale, by, None, torch.zeros(20, 64).bfloat16())
    tiles.expand(record, by, factor, torch.zeros(64, 256).to(codes.dtype), 0, 64)


def test_triton_compiles_an_optimizers_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maxima, step and factors, with the forms of torch on a GPU."""
    from nybble.optim import AdamW4bit, _forms, _fused

    optim = importlib.import_module("nybble.kernels.gpu_optim")
    _fused.find_kernel(torch.device("cpu"))
    monkeypatch.setitem(_fused.find_kernel.kernels, "cpu", optim.kernel_of)
    monkeypatch.setattr(optim, "forms", lambda device: _forms.Forms(1, 1, 1, 2, 1, 2, 0))
    made = []

    def compiled(kernel: Any, *given: Any, **meta: Any) -> None:
        made.append(kernel.__name__)
        compile_for_hopper(kernel, *given, **meta)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "__getitem__", lambda self, grid: partial(compiled, self))
    p = torch.nn.Parameter(torch.zeros(128, 256).bfloat16())
    p.grad = torch.ones_like(p)
    AdamW4bit([p], weights="residual8").step()
    assert made == ["maxima_kernel", "step_kernel", "factors_kernel"]


@pytest.mark.parametrize(
    ("fmt", "zero", "shift"), [("int4", False, False), ("uint4", True, True), ("nf4", False, True)]
)
def test_triton_compiles_rounding_that_trains(
    fmt: str, zero: bool, shift: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, and what is launched afterwards is given what they were compiled for."""
    straight = importlib.import_module("nybble.kernels.gpu_straight")
    made, launched = [], []

    class Kept:
        def __init__(self, kernel: Any, given: tuple[Any, ...], meta: dict[str, Any]) -> None:
            self.names, self.values = kernel.arg_names, dict(zip(kernel.arg_names, given, strict=False)) | meta

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *given: launched.append((self, dict(zip(self.names, given, strict=True))))

    def compiled(kernel: Any, *given: Any, **meta: Any) -> Kept:
        compile_for_hopper(kernel, *given, **{k: v for k, v in meta.items() if k in kernel.arg_names})
        made.append(kernel.__name__)
        return Kept(kernel, given, meta)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "__getitem__", lambda self, grid: partial(compiled, self))
    for elements in (64, 100_000):
        x, gradient = torch.zeros(2, elements), torch.zeros(2, elements).bfloat16()
        sides = torch.ones(2, 1), torch.ones(2, 1) if zero else None, torch.zeros_like(x) if shift else None
        for _ in range(2):
            straight.straight_round(x, *sides, fmt, "nearest-even", torch.bfloat16)
            straight.straight_round_backward(gradient, x, *sides, fmt, "nearest-even", True, True, True, 0.5)
    assert made == ["_scaled", "_scaled_backward"] * 2 and len(launched) == 4
    for kept, again in launched:
        same = {name: value for name, value in again.items() if not isinstance(value, torch.Tensor)}
        assert same == {name: kept.values[name] for name in same} and len(same) > 10
