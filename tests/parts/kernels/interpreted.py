"""Triton's kernels as its interpreter runs them: by ``test_gpu_products.py``, in a process that begins with it."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
import triton
from torch import Tensor

from nybble.kernels import cuda_products as gpu
from nybble.kernels._gpu_weights import Weight, weight_of
from nybble.nn.compiled import key_of
from nybble.qtensor import QTensor
from nybble.quantizer import Quantizer


def packed(line: str, n: int, k: int) -> QTensor:
    generator = torch.Generator().manual_seed(n * k)
    return Quantizer(line).quantize(torch.randn(n, k, generator=generator) / k**0.5)


def given(weight: QTensor) -> tuple[list[Tensor], str, list[int]]:
    tensors = weight.tensors()
    return list(tensors.values()), key_of(weight.spec(), list(tensors)), list(weight.shape)


def share_of_bound(y: Tensor, x: Tensor, weight: QTensor, bias: Tensor | None = None) -> float:
    """The largest error over the bound of rounding W and y to float16 and of float32 sums."""
    w = weight.dequantize().double()
    exact, size = x.double() @ w.T, x.double().abs() @ w.abs().T
    exact = exact if bias is None else exact + bias.double()
    bound = 2.0**-11 * exact.abs() + (2.0**-11 + w.shape[1] * 2.0**-24) * size + 2.0**-24 * (1 + w.shape[1])
    return float(((y.double() - exact).abs() / bound).max())


@pytest.mark.parametrize(
    ("line", "columns", "path"),
    [
        ("int4 group=128", 256, "packed"),
        ("int4 group=64 symmetric=false scale_format=float32", 192, "packed"),
        ("uint4 group=16 symmetric=false scale_format=bfloat16", 96, "packed"),
        ("int4 group=48 pad=true", 128, "packed"),
        ("int4 channel", 72, "packed"),
        ("int4 block=3x16", 64, "packed"),
        ("mxfp4", 96, "packed"),
        ("nvfp4", 96, "packed"),
        ("nvfp4-ct", 64, "packed"),
        ("nf4-dq", 128, "packed"),
        ("q4_k", 256, "packed"),
        ("int3 group=96", 192, "packed"),
        ("int2 group=16 symmetric=false", 64, "packed"),
        ("nf4 group=5", 75, "expanded"),
        ("int3 channel", 41, "expanded"),
        ("int6 group=32", 64, "expanded"),
    ],
)
def test_products_are_within_the_bound(line: str, columns: int, path: str) -> None:
    """W is the reference's bit for bit (its divided scales but for the last one); every branch by rows of x."""
    weight = packed(line, 33, columns)
    record = weight_of(weight)
    assert isinstance(record, Weight) and path in gpu.how(*given(weight))[1]
    values, wanted = gpu.expand(record, torch.float16, 5, 33), weight.dequantize(torch.float16)[5:]
    assert torch.equal(values, wanted) or (line == "nvfp4-ct" and torch.allclose(values, wanted, rtol=2e-3))
    bias = torch.randn(33).half()
    for rows, b in ((1, None), (1, bias), (18, bias)):
        x = torch.randn(rows, columns + 8).half()[:, 8:]
        assert share_of_bound(gpu.linear(x, *given(weight), b), x, weight, b) < 1


def test_columns_in_parts_and_wide_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of several programs are added; W goes a part of its rows at a time."""
    weight = packed("int4 group=32", 40, 1024)
    record, x = weight_of(weight), torch.randn(5, 1024).half()
    assert isinstance(record, Weight)
    bias = torch.randn(40).half()
    y = gpu.multiply(x, record, bias, gpu.Tile(32, 16, 16, parts=3))
    assert share_of_bound(y, x, weight, bias) < 1
    monkeypatch.setattr(gpu, "ROWS", 4)
    assert gpu.path_of(record, 5, x.dtype) == "expanded" and gpu.path_of(record, 4, x.dtype) == "tiles"
    for part in (7 * 1024, 1 << 20):
        for b in (None, bias):
            assert share_of_bound(gpu.multiply_expanded(x, record, b, part), x, weight, b) < 1


def test_float32_is_multiplied_as_such() -> None:
    weight, x = packed("nvfp4", 16, 64), torch.randn(2, 3, 64)
    y = gpu.linear(x, *given(weight), None)
    assert y.shape == (2, 3, 16) and torch.allclose(y, x @ weight.dequantize().T, atol=1e-5)
    assert gpu.linear(x[:0], *given(weight), None).shape == (0, 3, 16)


def test_a_record_is_made_once_and_holds_no_more_than_the_weight() -> None:
    weight = packed("int4 group=32", 16, 64)
    tensors, key, shape = given(weight)
    gpu.linear(torch.randn(1, 64).half(), tensors, key, shape, None)
    kept = tensors[0].__dict__["_nybble_gpu_weight"][2]
    gpu.linear(torch.randn(2, 64).half(), tensors, key, shape, None)
    assert tensors[0].__dict__["_nybble_gpu_weight"][2] is kept
    assert kept.codes.data_ptr() == tensors[0].data_ptr() and kept.nbytes() == weight.nbytes()


def test_an_old_triton_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader says once what it couldn't load."""
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    monkeypatch.delitem(sys.modules, gpu.__name__)
    with pytest.raises(ImportError, match=r"Triton 3\.5\.1; the kernels need 3\.6"):
        importlib.import_module(gpu.__name__)
