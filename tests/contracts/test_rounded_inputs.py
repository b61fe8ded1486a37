"""Activations rounded by the compiled library: the bits of the readable version."""

from __future__ import annotations

import pytest
import torch
from tests.contracts import compiled
from torch import Tensor

from nybble.kernels import cpu_inputs
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.input_rounding import rounded_inputs
from nybble.quantizer import Quantizer

LINES = [
    "float8_e4m3fn token", "float8_e5m2 group=64", "float4_e2m1fn group=32",
    "float8_e4m3fn token scale_format=bfloat16",
    "nvfp4", "nvfp4 scale=absmax(target=5)", "mxfp8", "mxfp6", "mxfp4-ocp", "mxfp4-ct", "mxfp4-mlx", "mxfp4-modelopt",
    "mxint8", "bfp12", "int8 token", "int8 group=32", "int4 token", "float16 token",
]  # fmt: skip
ISAS = [isa for isa in (0, 2, 3) if isa <= (0 if (made := compiled.library()) is None else made.nybble_isa())]
pytestmark = compiled.needed


def same(a: Tensor, b: Tensor) -> bool:
    """NaN in the same places, zeros of the same sign, and all else equal."""
    lost = a.isnan()
    signs = torch.equal(a.signbit() & ~lost, b.signbit() & ~lost)
    return a.dtype == b.dtype and torch.equal(lost, b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()) and signs


def activations() -> Tensor:
    """Rows of many sizes; zeros, a whole row of them and a group; a subnormal."""
    torch.manual_seed(0)
    x = torch.randn(7, 192) * torch.logspace(-3, 3, 7).view(-1, 1)
    x[1], x[2, :32], x[3, 5], x[4, 100] = 0, 0, 1e-40, -0.0
    return x


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("isa", ISAS)
def test_the_bits_are_those_of_the_readable_version(line: str, isa: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_inputs, "_ISA", isa)
    quantizer = Quantizer(line)
    assert cpu_inputs._rounding(str(quantizer), 192) is not None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for size in (1, 1e-38, 1e30):
            for odd in (1.0, float("nan"), float("inf")):
                x = (activations() * size).to(dtype)
                x[5, 40] = odd
                assert same(rounded_inputs(x, str(quantizer)), quantizer.fake_quantize(x)), (dtype, size, odd)


def test_shared_among_threads_and_strided() -> None:
    x = torch.randn(300, 2, 640)[..., ::2]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    found = rounded_inputs(x, "nvfp4")
    torch.set_num_threads(before)
    assert same(found, Quantizer("nvfp4").fake_quantize(x))


@pytest.mark.parametrize("line", ["mxfp4", "nvfp4-ct", "int8 tensor", "float8_e4m3fn token rounding=half-up"])
def test_what_it_has_no_version_of_goes_the_readable_way(line: str) -> None:
    quantizer, x = Quantizer(line), torch.randn(4, 64)
    assert cpu_inputs._rounding(str(quantizer), 64) is None
    assert same(rounded_inputs(x, str(quantizer)), quantizer.fake_quantize(x))


def test_layers_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(x: Tensor, line: str) -> Tensor:
        calls.append(1)
        return cpu_inputs.rounded(x, line)

    monkeypatch.setitem(rounded_inputs._kernels, "cpu", counted)
    inputs = ActivationQuantizer(Quantizer("float8_e4m3fn token"))
    x = torch.randn(3, 64, requires_grad=True)
    assert same(inputs(x.detach()), inputs.quantizer.fake_quantize(x)) and calls == [1]
    inputs(x).sum().backward()  # training goes its own way
    assert calls == [1] and x.grad is not None


def test_the_schema_and_the_fake_hold() -> None:
    torch.library.opcheck(torch.ops.nybble.rounded_inputs.default, (torch.randn(2, 64), "nvfp4"))
