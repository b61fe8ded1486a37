"""Straight-through: torch's fake quantization, values and gradients; scales that follow the weight."""

from __future__ import annotations

import pytest
import torch

from nybble.core.errors import FormatError, SchemeError
from nybble.learned import ACTIVATIONS, make_part
from nybble.qtensor import QuantParams
from nybble.quantizer import Quantizer


def test_torch_fake_quantize() -> None:
    """``torch.fake_quantize_per_channel_affine``, asymmetric too; scales are powers of two, torch multiplies by 1/s."""
    x, upstream = 3 * torch.randn(4, 32), torch.randn(4, 32)
    scale = torch.tensor([0.125, 0.25, 0.5, 1.0])
    for line, low, high, zero in (
        ("int4_full channel", -8, 7, torch.zeros(4)),
        ("uint4 channel symmetric=false", 0, 15, torch.tensor([8.0, 3.0, 0.0, 15.0])),
    ):
        quantizer = Quantizer(line)
        shifted = zero.reshape(4, 1) if quantizer.scale.needs_integer else None
        part = make_part("ste", {}).make(quantizer, x, QuantParams(scale.reshape(4, 1), shifted))
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected = torch.fake_quantize_per_channel_affine(theirs, scale, zero.int(), 0, low, high)
        found = part.train()(mine)
        assert torch.equal(found, expected) and torch.equal(part.eval()(x), expected)
        (found * upstream).sum().backward()
        (expected * upstream).sum().backward()  # type: ignore[no-untyped-call]
        assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]
        assert (theirs.grad == 0).any()  # type: ignore[union-attr]


@pytest.mark.parametrize("line", ["int4 channel", "nvfp4", "int8 tensor", "float4_e2m1fn group=8 scale=mse"])
def test_scales_follow_the_weight(line: str) -> None:
    x, other = torch.randn(4, 64), 5 * torch.randn(4, 64)
    part = make_part("ste", {}).make(Quantizer(line), x)
    for mode in (True, False):
        assert torch.equal(part.train(mode)(other), Quantizer(line).fake_quantize(other))
    assert not part.state_dict()
    kept = make_part("ste", {}).make(Quantizer(line), x, Quantizer(line).fit(x))
    assert torch.equal(kept(other), Quantizer(line).fake_quantize(other, Quantizer(line).fit(x)))
    assert kept.state_dict()


@pytest.mark.parametrize(
    "line", ["int4 channel", "float4_e2m1fn group=8", "int4 group=8 symmetric=false", "int8 token"]
)
def test_no_gradient_goes_through_the_scale(line: str) -> None:
    """Of min-max rounding every element is inside, so the gradient is the upstream one, at the largest element too."""
    x = torch.randn(40, 64, requires_grad=True)
    upstream = torch.randn(40, 64)
    (make_part("ste", {}).make(Quantizer(line), x).train()(x) * upstream).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, upstream, rtol=3e-7, atol=0)  # times the scale, over the scale


def test_inside_ends_half_a_step_beyond() -> None:
    """Of floats half of the last gap: 4 to 6 in E2M1, so 7; of integers half of one; a code's own with a zero point."""
    ones = torch.ones(1, 1)
    for line, zero, inside in (
        ("float4_e2m1fn channel", None, 7.0), ("int4 channel", None, 7.5), ("uint4 channel symmetric=false", 3.0, 12.5)
    ):  # fmt: skip
        x = torch.tensor([[inside - 1e-3, inside + 1e-3, 0.0]]).requires_grad_()
        start = QuantParams(ones, None if zero is None else zero * ones)
        make_part("ste", {}).make(Quantizer(line), x, start).train()(x).sum().backward()
        assert x.grad is not None and x.grad.tolist() == [[1.0, 0.0, 1.0]]


def test_static_activations_keep_the_first_scale() -> None:
    x = torch.randn(2, 3, 8)
    quantizer = Quantizer("int8 tensor static")
    part = make_part("ste", {}).make(quantizer, x, side=ACTIVATIONS)
    assert torch.equal(part(7 * x), quantizer.fake_quantize(7 * x, quantizer.fit(x)))
    assert part.fixed() is not None
    assert make_part("ste", {}).make(Quantizer("int8 token"), x, side=ACTIVATIONS).fixed() is None


def test_blocks_of_zeros_have_a_gradient() -> None:
    """Of a scale that follows its block's largest magnitude: 0 over 0 reached everything behind."""
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    x[0, :16] = 0
    x.requires_grad_()
    learned = make_part("ste", {"through": True}).make(Quantizer("nvfp4-search"), x.detach()).train()
    learned(x).square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad[0, 16:].abs().sum() > 0


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_min_max_of_llm_qat(bits: int) -> None:
    """Sheet llm-qat, 1 and 2: codes, largest element, error, idempotence; rows and signs apart."""
    quantizer, x = Quantizer(f"int{bits} channel"), torch.randn(6, 400)
    x[:, 7] *= 30
    stored, top = quantizer.quantize(x), 2 ** (bits - 1) - 1
    found, scale = stored.dequantize(), x.abs().amax(1, keepdim=True) / top
    values = (found / scale).round()
    assert values.abs().amax(1).tolist() == [top] * 6
    torch.testing.assert_close(found, scale * values, rtol=3e-7, atol=0)
    torch.testing.assert_close(found[:, 7], x[:, 7], rtol=3e-7, atol=0)
    assert ((found - x).abs() <= scale / 2 * (1 + 1e-5)).all()
    assert torch.equal(quantizer.quantize(found).unpacked(), stored.unpacked())
    torch.testing.assert_close(quantizer.fake_quantize(found), found, rtol=3e-7, atol=0)
    assert torch.equal(quantizer.fake_quantize(-x), -found)
    x[2] *= 4
    assert torch.equal(quantizer.fake_quantize(x)[[0, 1, 3, 4, 5]], found[[0, 1, 3, 4, 5]])
    assert torch.equal(quantizer.fake_quantize(x)[2], 4 * found[2])
    x[3] = 0
    assert not quantizer.fake_quantize(x)[3].any()


@pytest.mark.parametrize(("line", "side"), [("int4 channel", "weights"), ("int8 token", ACTIVATIONS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask(line: str, side: str, dtype: torch.dtype) -> None:
    """Sheet llm-qat, 4: no gradient where |x| >= 2, and there alone; values don't see it."""
    x, upstream = (2 * torch.randn(4, 64)).to(dtype), torch.randn(4, 64).to(dtype)
    x[0, :4] = torch.tensor([2.0, -2.0, 1.9375, -1.9375]).to(dtype)
    plain, masked = (
        make_part("ste", options).make(Quantizer(line), x, side=side).train() for options in ({}, {"mask": 2.0})
    )
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    assert torch.equal(plain(one), masked(other)) and torch.equal(masked(x), masked.eval()(x))
    plain.train()(one).backward(upstream)
    masked.train()(other).backward(upstream)
    assert one.grad is not None and other.grad is not None
    assert torch.equal(other.grad, torch.where(x.abs() >= 2, 0.0, one.grad)) and (other.grad == 0).sum() > 10
    with pytest.raises(SchemeError, match="mask=-1"):
        make_part("ste", {"mask": -1.0})


def test_activations_of_few_bits_are_not_left_alone() -> None:
    """Sheet llm-qat, 8: widths that can't be are errors, two bits are two; an odd token harms no other."""
    for line, said in (("int0 token", "1 to 8 bits"), ("int9 token", "1 to 8 bits"), ("int1 token", "binary")):
        with pytest.raises(FormatError, match=said):
            Quantizer(line)
    x = torch.randn(5, 64)
    plain = make_part("ste", {}).make(Quantizer("int2 token"), x, side=ACTIVATIONS).train()(x)
    assert all(len(row.unique()) == 3 for row in plain)
    x[1], x[2, 5], x[3, 5] = 0, torch.nan, torch.inf
    part = make_part("ste", {}).make(Quantizer("int2 token"), x, side=ACTIVATIONS)
    for found in (part.train()(x), part.eval()(x)):
        assert torch.equal(found[[0, 4]], plain[[0, 4]]) and not found[1].any()
        assert found[2, 5].isnan() and not found[3].isfinite().all()
