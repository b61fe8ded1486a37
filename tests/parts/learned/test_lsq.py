"""LSQ: its equations in float64, and torch's own learnable fake quantization."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nybble.formats import get_format
from nybble.learned import ACTIVATIONS, WEIGHTS, Learned, make_part
from nybble.learned.lsq import LearnedScale
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer


def learned(line: str, x: Tensor, side: str = WEIGHTS, scale: float | None = None) -> LearnedScale:
    found: Learned = make_part("lsq", {}).make(Quantizer(line), x, side=side)
    assert isinstance(found, LearnedScale)
    if scale is not None:
        with torch.no_grad():
            found.scale.fill_(scale)
    return found.train()


def equation(x: Tensor, scale: Tensor, grid: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_hat, dL/dx and dL/ds (before g), element by element in float64: eq. 1-3, ``grid`` for the integers."""
    x, scale, upstream = x.double(), scale.double(), upstream.double()
    y = x / scale
    near = grid[(y.unsqueeze(-1) - grid).abs().argmin(-1)]
    inside = (y >= grid[0]) & (y <= grid[-1])
    return near * scale, upstream * inside, (upstream * torch.where(inside, near - y, near))


@pytest.mark.parametrize("line", ["int4", "int4_full", "int3", "float4_e2m1fn", "nf4", "float8_e4m3fn", "ternary"])
def test_equations(line: str) -> None:
    fmt, x = get_format(line), torch.randn(6, 40)
    grid = torch.tensor(fmt.grid, dtype=torch.float64)
    for granularity, count in (("channel", 40), ("tensor", 240), ("group=8 scale_format=float32", 8)):
        part = learned(f"{line} {granularity} scale=learned", x)
        with torch.no_grad():
            part.scale.mul_(torch.linspace(0.5, 1.1, part.scale.numel()).reshape(part.scale.shape))  # some are clipped
        upstream, x_in = torch.randn(6, 40), x.clone().requires_grad_()
        found = part(x_in)
        (found * upstream).sum().backward()
        scale = part.quantizer.granularity.expand(part.scale.detach(), x.shape)
        value, to_x, to_scale = equation(x, scale, grid, upstream)
        torch.testing.assert_close(found.detach().double(), value, rtol=3e-7, atol=1e-12)
        assert x_in.grad is not None and part.scale.grad is not None
        torch.testing.assert_close(x_in.grad.double(), to_x, rtol=1e-6, atol=1e-7)
        summed = part.quantizer.granularity.to_blocks(to_scale).sum(1).reshape(part.scale.shape)
        g = 1 / math.sqrt(count * fmt.max)
        # each term is a float32 difference of numbers up to the largest value
        torch.testing.assert_close(part.scale.grad.double(), g * summed, rtol=1e-5, atol=g * fmt.max * 2e-6 * count)


def test_torch_learnable_fake_quantize() -> None:
    """The same outputs and gradients as ``torch._fake_quantize_learnable_*``, with its grad_factor as g.

    Scales are powers of two, so that torch's product with 1 / s rounds nothing. Torch counts up to half a step beyond
    the range as inside, the paper doesn't: those elements are left out.
    """
    x = 2 * torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    for step in (0.125, 0.25, 0.5, 1.0, 2.0):
        for low, high in ((-8, 7), (-3, 3)):
            y = x / step
            x[((y < low) & (y >= low - 0.5)) | ((y > high) & (y <= high + 0.5))] = 0.3
    upstream = torch.randn(5, 32)
    for line, low, high in (("int4_full tensor", -8, 7), ("int3 tensor", -3, 3)):
        part = learned(line, x, scale=0.25)
        mine, theirs, scale = (
            x.clone().requires_grad_(),
            x.clone().requires_grad_(),
            torch.tensor([0.25]).requires_grad_(),
        )
        zero = torch.zeros(1, requires_grad=True)
        expected = torch._fake_quantize_learnable_per_tensor_affine(
            theirs, scale, zero, low, high, 1 / math.sqrt(160 * high)
        )
        found = part(mine)
        assert torch.equal(found, expected)
        (found * upstream).sum().backward()
        (expected * upstream).sum().backward()  # type: ignore[no-untyped-call]
        assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]
        torch.testing.assert_close(part.scale.grad.reshape(1), scale.grad, rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]
    part = learned("int4_full channel", x)
    scales = torch.tensor([0.125, 0.25, 0.5, 1.0, 2.0])
    with torch.no_grad():
        part.scale.copy_(scales[:, None])
    mine, theirs, scale = x.clone().requires_grad_(), x.clone().requires_grad_(), scales.clone().requires_grad_()
    expected = torch._fake_quantize_learnable_per_channel_affine(
        theirs, scale, torch.zeros(5, requires_grad=True), 0, -8, 7, 1 / math.sqrt(32 * 7)
    )
    found = part(mine)
    assert torch.equal(found, expected)
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]
    torch.testing.assert_close(part.scale.grad.flatten(), scale.grad, rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]


def test_activations() -> None:
    """Unsigned after a ReLU, asymmetric with a fixed zero point; N counts features, of images all of one."""
    tokens = torch.randn(3, 7, 16).relu()
    part = learned("uint4 tensor static", tokens, ACTIVATIONS)
    assert part.factor == pytest.approx(1 / math.sqrt(16 * 15))
    assert learned("int8 tensor static", torch.randn(2, 3, 4, 4), ACTIVATIONS).factor == pytest.approx(
        1 / math.sqrt(48 * 127)
    )
    part(tokens).square().sum().backward()
    assert part.scale.grad is not None and part.scale.grad.abs() > 0
    shifted = learned("uint4 tensor static symmetric=false", tokens - 0.3, ACTIVATIONS)
    settled = shifted.settle(tokens)
    assert settled.zero_point is not None  # type: ignore[union-attr]
    assert torch.equal(shifted(tokens), shifted.quantizer.fake_quantize(tokens, settled))  # type: ignore[arg-type]


@pytest.mark.parametrize("line", ["nvfp4", "mxfp4", "float4_e2m1fn channel scale_format=float16"])
def test_nested_scales_are_used_as_stored(line: str) -> None:
    """Training sees the stored scale; its raw value moves below the resolution of the format until a step is made."""
    x = torch.randn(4, 64)
    part = learned(line, x)
    before = part.settle(x).dequantize()  # type: ignore[union-attr]
    with torch.no_grad():
        part.scale.mul_(1 + 1e-5)
    assert torch.equal(part(x), before) and torch.equal(part.eval()(x), before)
    with torch.no_grad():
        part.scale.mul_(1.6)
    assert not torch.equal(part.eval()(x), before)
    assert torch.equal(part.train()(x), part.eval()(x))


def test_the_outer_scale_stays() -> None:
    """Of NVFP4 the float32 scale over the E4M3 ones is the first one's, however far these move."""
    x, line = torch.randn(4, 64), Quantizer("nvfp4")
    part = learned("nvfp4", x)
    with torch.no_grad():
        part.scale.mul_(0.3)
    first, last = line.quantize(x).params.scale, part.settle(x).params.scale  # type: ignore[union-attr]
    assert isinstance(first, BlockQTensor) and isinstance(last, BlockQTensor)
    assert torch.equal(last.params.scale, first.params.scale)  # type: ignore[arg-type]
    assert not torch.equal(last.codes, first.codes)


def test_the_first_scale() -> None:
    """scale=learned is the paper's 2 mean|x| / sqrt(Q_P), 2**(b-1) - 1 of -8 .. 7, too; else the quantizer's own."""
    x = torch.randn(4, 64)
    for fmt, top in (("int4", 7), ("int4_full", 7), ("int2_full", 1)):
        expected = 2 * x.abs().mean(1, keepdim=True) / math.sqrt(top)
        torch.testing.assert_close(learned(f"{fmt} channel scale=learned", x).scale.detach(), expected)
    own = Quantizer("int4 channel").fit(x).scale
    assert isinstance(own, Tensor) and torch.equal(learned("int4 channel", x).scale.detach(), own)
