"""A packed layer in training: the bits of the readable way in both directions, and no matrix kept between them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nybble.nn.linear import QuantLinear
from nybble.nn.packed import Packed
from nybble.quantizer import Quantizer


def layer(line: str = "nf4-bnb-dq", dtype: torch.dtype = torch.float32, bias: bool = True) -> QuantLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 32, generator=generator)
    shift = torch.randn(24, generator=generator).to(dtype) if bias else None
    return QuantLinear(Quantizer(line).quantize(weight), shift).standing_for(dtype)


def dense(found: QuantLinear, dtype: torch.dtype) -> Tensor:
    assert isinstance(found.weight, Packed)
    return found.weight.dequantize(dtype)


def given(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def backward(y: Tensor) -> None:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    (y * weights).sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("line", ["nf4-bnb-dq", "int4 group=16", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 32)])
def test_bits_of_the_readable_way(line: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    found = layer(line, dtype)
    assert found.bias is not None
    found.bias.requires_grad_()
    x, again = given(*shape, dtype=dtype), given(*shape, dtype=dtype)
    bias = found.bias.detach().clone().requires_grad_()
    y = found(x)
    readable = functional.linear(again, dense(found, dtype), bias)
    assert torch.equal(y, readable)
    backward(y)
    backward(readable)
    assert x.grad is not None and again.grad is not None and bias.grad is not None
    assert torch.equal(x.grad, again.grad) and x.grad.dtype == dtype
    assert found.bias.grad is not None and torch.equal(found.bias.grad, bias.grad)


def test_nothing_is_kept_for_backward() -> None:
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        backward(layer()(given(5, 32)) + 0)
    assert all(t.shape == (5, 24) for t in kept)  # of the sum in this test


def test_a_bias_alone_has_its_gradient() -> None:
    found = layer()
    assert found.bias is not None
    found.bias.requires_grad_()
    found(torch.ones(3, 32)).sum().backward()
    assert found.bias.grad is not None and torch.equal(found.bias.grad, torch.full((24,), 3.0))


def test_under_autocast() -> None:
    found, x, again = layer(bias=False), given(5, 32), given(5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y, readable = found(x), functional.linear(again, dense(found, torch.float32))
    assert y.dtype == torch.bfloat16 and torch.equal(y, readable)
    backward(y)
    backward(readable)
    assert x.grad is not None and again.grad is not None
    assert torch.equal(x.grad, again.grad) and x.grad.dtype == torch.float32


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)  # torch asks itself, in forward ones
def test_other_derivatives() -> None:
    """Second ones, forward ones, and whole matrices of them."""
    found = layer(dtype=torch.float64).double()
    x = given(2, 32).detach().double().requires_grad_()
    assert torch.autograd.gradcheck(found, (x,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(found, (x,))
    whole = torch.func.jacrev(found)(x[0].detach())
    assert torch.equal(whole, dense(found, torch.float64))
