"""Quantization with gradients: the forward bit for bit, the backward against the published formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tests.contracts.inputs import random_bits, same
from tests.contracts.test_presets import LINES, inputs
from torch import Tensor

from nybble.core.errors import DataError, SchemeError
from nybble.formats import format_names, get_format
from nybble.ops.grid import Grid, nearest, straight_through
from nybble.qtensor import Factored, Inverse, QTensor, QuantParams, dense
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.rounding import get_rounding
from nybble.scales.one import One

GRANULARITIES = [
    *("tensor", "channel", "token", "plane", "group=16", "group=40 pad=true", "block=2x8", "flat=48", "rank1"),
    *("shifted", "shifted=2"),
]
DETERMINISTIC = [line for line in LINES if not get_rounding(Quantizer(line).rounding).stochastic]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def rounding_of(q: Quantizer) -> Callable[[Tensor, Grid], Tensor] | None:
    return partial(nearest, generator=generator()) if get_rounding(q.rounding).stochastic else None


def stored_alike(q: Quantizer, x: Tensor, a: QuantParams, b: QuantParams) -> bool:
    """Whether both write the same bytes, codes of ``x`` included."""
    first, second = q.quantize(x, a, generator()), q.quantize(x, b, generator())
    tensors, others = first.tensors(), second.tensors()
    return first.spec() == second.spec() and all(same(value, others[key]) for key, value in tensors.items())


# ---------------------------------------------------------------------------------------------------------- forward
@pytest.mark.parametrize("line", LINES)
def test_forward_is_fake_quantize(line: str) -> None:
    q = Quantizer(line)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = inputs(dtype)
        params = q.measured(x, None)
        want = q.fake_quantize(x, params, generator())
        for given in (None, params, q.soften(params)):
            out = q.soft(x.clone().requires_grad_(), given, rounding_of(q))
            assert out.requires_grad and same(out.detach(), want)
    assert q.soft(torch.zeros(0, 768)).shape == (0, 768)


def test_a_mean_that_is_not_given_is_measured() -> None:
    """fit() finds no mean: it is the tensor's own, and passes gradients; a mean that is given is kept."""
    q = Quantizer("int4 channel center=mean")
    x = (torch.randn(4, 32) + 3).requires_grad_()
    params = q.measured(x, None)
    bare = replace(params, offset=None)
    out = q.soft(x, bare)
    assert same(out.detach(), q.fake_quantize(x, params)) and same(q.fake_quantize(x, bare), out.detach())
    assert torch.allclose(torch.autograd.grad(out.sum(), x)[0], torch.ones(4, 32), atol=1e-5)
    kept = q.fake_quantize(x + 0.25, params)
    assert same(q.quantize(x + 0.25, params).dequantize(), kept)
    assert not torch.allclose(kept, q.fake_quantize(x + 0.25, bare))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("fmt", format_names())
def test_forward_of_every_format_and_granularity(fmt: str, granularity: str) -> None:
    try:
        q = Quantizer(f"{fmt} {granularity}")
    except SchemeError:
        assert granularity == "shifted"  # a table has no exponent
        return
    x = torch.randn(6, 4, 16)
    params = q.measured(x, None)
    assert same(q.soft(x, q.soften(params)), q.fake_quantize(x, params))
    assert stored_alike(q, x, params, q.harden(q.soften(params)))


@pytest.mark.parametrize("line", [*LINES, "float4_e2m1fn group=32 center=mean offset_format=float16"])
def test_raw_and_back(line: str) -> None:
    """Also through a saved tensor, whose divisor (raw_scale) is not known any more."""
    q = Quantizer(line)
    x = inputs(torch.float32)
    params = q.measured(x, None)
    raw = q.soften(params)
    assert not any(isinstance(v, QTensor) for v in (raw.scale, raw.zero_point, raw.offset))
    assert stored_alike(q, x, params, q.harden(raw))
    loaded = q.quantize(x, params, generator()).params
    assert stored_alike(q, x, loaded, q.harden(q.soften(loaded)))
    hard = q.harden(params)
    assert stored_alike(q, x, params, hard) and stored_alike(q, x, hard, q.harden(hard))


def test_raw_is_a_copy() -> None:
    q = Quantizer("int4 channel")
    params = q.fit(torch.randn(4, 8))
    before = dense(params.scale).clone()  # type: ignore[arg-type]
    raw = q.soften(params)
    assert isinstance(raw.scale, Tensor)
    raw.scale.mul_(2)
    assert same(dense(params.scale), before)  # type: ignore[arg-type]


@pytest.mark.parametrize("inner", ["dynamic8 flat=64 center=mean", "float8_e4m3fn tensor center=mean"])
def test_raw_scales_around_a_large_mean(inner: str) -> None:
    """Where several codes mean one float32, the raw value is the one next to it that finds its own code."""
    q, found = Quantizer("int4 flat=8", scale_format=Quantizer(inner)), 0
    assert isinstance(q.scale_format, Quantizer)
    for _ in range(100):
        stored = q.scale_format.quantize(0.1 * (1 + 6e-6 * torch.randn(512)))
        again = q.scale_format.quantize(stored.dequantize(), stored.params)
        found += not torch.equal(again.codes, stored.codes)
        back = q.harden(q.soften(QuantParams(stored))).scale
        assert isinstance(back, BlockQTensor) and torch.equal(back.codes, stored.codes)
    assert found > 3


@pytest.mark.parametrize(
    "line",
    [
        *("int4 channel", "uint4 group=16 symmetric=false", "float4_e2m1fn group=16 scale=minmax(offset=true)"),
        *("binary group=8", "int4 channel reciprocal=true", "nvfp4"),
    ],
)
def test_a_share_of_the_gradient_reaches_the_scale(line: str) -> None:
    """Whether it is all in one operation or goes step by step; the values, and what reaches x, stay."""
    q, x = Quantizer(line), inputs(torch.float32)
    raw, found = q.soften(q.measured(x, None)), []
    for share in (1.0, 0.25):
        own, scale = x.clone().requires_grad_(), dense(raw.scale).clone().requires_grad_()  # type: ignore[arg-type]
        y = q.soft(own, replace(raw, scale=scale), share=share)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), (own, scale))))
    assert same(found[0][0], found[1][0]) and same(found[0][1], found[1][1])
    assert same(found[0][2] / 4, found[1][2]) and bool((found[1][2] != 0).any())


# --------------------------------------------------------------------------------------------------------- backward
def elementwise(q: Quantizer, value: Tensor, shape: torch.Size) -> Tensor:
    """A value a block, for each element (or a factor, broadcast); keeps the gradient and float64."""
    count = value.numel()
    if count == 1:
        return value.reshape(())
    columns = q.granularity.to_blocks(torch.zeros(shape)).shape[1]
    index = q.granularity.from_blocks(torch.arange(count).reshape(-1, 1).expand(count, columns), shape)
    return value.reshape(-1)[index]


def reference(
    q: Quantizer, x: Tensor, raw: QuantParams, stored: QuantParams
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """``x_hat`` in float64 and its leaves: identity inside, clamp outside, the rounding error a constant.

    And which elements float32 may round to the other side, as close to a tie as they are.
    """
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, value: Tensor, kept: Tensor | QTensor) -> Tensor:
        leaves[name] = value.detach().double().requires_grad_()
        return leaves[name] + (dense(kept).double().reshape(value.shape) - leaves[name]).detach()

    scale = divisor = torch.ones((), dtype=torch.float64)
    if isinstance(raw.scale, Factored) and isinstance(stored.scale, Factored):
        factors = [leaf(f"scale.{i}", f, f) for i, f in enumerate(raw.scale.factors) if isinstance(f, Tensor)]
        scale = factors[0]
        for factor in factors[1:]:
            scale = scale * factor if raw.scale.combine == "product" else torch.minimum(scale, factor)
        divisor = scale
    elif isinstance(raw.scale, Tensor):
        assert isinstance(stored.scale, Tensor | QTensor)
        scale = elementwise(q, leaf("scale", raw.scale, stored.scale), x.shape)
        divisor = elementwise(q, leaves["scale"], x.shape) if q.raw_scale else scale
    zero = offset = torch.zeros((), dtype=torch.float64)
    if raw.zero_point is not None and stored.zero_point is not None:
        assert isinstance(raw.zero_point, Tensor)
        zero = elementwise(q, leaf("zero_point", raw.zero_point, stored.zero_point), x.shape)
    if raw.offset is not None and stored.offset is not None:
        assert isinstance(raw.offset, Tensor)
        offset = elementwise(q, leaf("offset", raw.offset, stored.offset), x.shape)
    leaves["x"] = x.detach().double().requires_grad_()
    y = (leaves["x"] - offset) / divisor
    clipped = torch.clamp(y, q.format.min - zero, q.format.max - zero)
    target = (y + zero).detach()
    if q.floor:
        least = q.format.min_normal if q.floor == "normal" else q.format.smallest
        target = torch.where(target < 0, target.clamp(max=-least), target.clamp(min=least))
    grid = torch.from_numpy(np.array(q.format.grid))
    above = torch.bucketize(target, grid).clamp(1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    value = torch.where(target - low < high - target, low, high) - zero.detach()
    close = (2 * target - low - high).abs() < 1e-5 * target.abs()
    return scale * (clipped + (value - clipped).detach()) + offset, leaves, close


def gradients(q: Quantizer, x: Tensor, raw: QuantParams, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from ``soft``: its value and all gradients."""
    leaves = {"x": x.clone().requires_grad_()}
    if isinstance(raw.scale, Factored):
        for i, factor in enumerate(raw.scale.factors):
            assert isinstance(factor, Tensor)
            leaves[f"scale.{i}"] = factor.clone().requires_grad_()
        factors = tuple(leaves[f"scale.{i}"] for i in range(len(raw.scale.factors)))
        raw = replace(raw, scale=Factored(factors, raw.scale.combine))
    for name in ("scale", "zero_point", "offset"):
        value = getattr(raw, name)
        if isinstance(value, Tensor):
            leaves[name] = value.clone().requires_grad_()
            changed: dict[str, Any] = {name: leaves[name]}
            raw = replace(raw, **changed)
    out = q.soft(leaves["x"], raw)
    return out, derivatives(out, weight, leaves)


def derivatives(out: Tensor, weight: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of ``sum(out * weight)``; zero where a leaf takes no part."""
    found = torch.autograd.grad((out * weight).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def check_gradients(q: Quantizer, x: Tensor, raw: QuantParams) -> dict[str, Tensor]:
    weight = torch.randn(x.shape)
    out, found = gradients(q, x, raw, weight)
    stored = q.harden(raw)
    assert same(out.detach(), q.fake_quantize(x, stored))
    want_out, leaves, _ = reference(q, x, raw, stored)
    assert torch.allclose(out.detach().double(), want_out.detach(), rtol=1e-5, atol=1e-6)
    want = derivatives(want_out, weight.double(), leaves)
    assert want.keys() == found.keys()
    for name, expected in want.items():
        # Sums of float32 terms as large as the largest value; a wrong formula is off by the rounding error itself.
        bound = 1e-5 * float(weight.abs().sum()) * q.format.absmax if name != "x" else 1e-5
        assert torch.allclose(found[name].double(), expected, rtol=1e-3, atol=min(bound, 1e-3 * q.format.absmax)), name
    return found


def shrunk(raw: QuantParams, by: float = 0.6) -> QuantParams:
    """Scales that clip some of the elements, and put none at the very end of the range."""
    if isinstance(raw.scale, Factored):
        every = raw.scale.combine == "min"
        factors = tuple(dense(f) * (by if every or i == 0 else 1) for i, f in enumerate(raw.scale.factors))
        return replace(raw, scale=Factored(factors, raw.scale.combine))
    return replace(raw, scale=raw.scale * by) if isinstance(raw.scale, Tensor) else raw


@pytest.mark.parametrize("line", DETERMINISTIC)
def test_gradients(line: str) -> None:
    q = Quantizer(line)
    if q.format.absmax > 1e30:  # clipped elements overflow float32
        return
    x = torch.randn(16, 768) * torch.rand(16, 1)
    raw = shrunk(q.soften(q.measured(x, None)))
    x = x.masked_fill(reference(q, x, raw, q.harden(raw))[2], 0)
    found = check_gradients(q, x, raw)
    assert found["x"].count_nonzero() > 0
    if not isinstance(q.scale, One):
        assert any(found[name].count_nonzero() > 0 for name in found if name.startswith("scale"))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    "line",
    ["int4", "int4 symmetric=false", "float4_e2m1fn", "nf4 scale=minmax(offset=true)", "int3 scale_format=float16"],
)
def test_gradients_of_every_granularity(line: str, granularity: str) -> None:
    try:
        q = Quantizer(f"{line} {granularity}")
    except SchemeError:
        assert granularity in ("rank1", "shifted", "shifted=2")  # factors are float32 maxima
        return
    x = torch.randn(4, 6, 48)
    check_gradients(q, x, shrunk(q.soften(q.fit(x))))


def test_lsq_by_hand() -> None:
    """Esser et al. 2020, eq. 3: -Q_N, round(v) - v, Q_P; here Q_N = Q_P = 7 and s = 0.5."""
    q = Quantizer("int4 channel")
    v = torch.tensor([[-9.0, -3.3, 0.2, 2.4, 6.9, 11.0]])
    scale = torch.full((1, 1), 0.5, requires_grad=True)
    x = (v * 0.5).requires_grad_()
    out = q.soft(x, QuantParams(scale))
    assert torch.equal(out, torch.tensor([[-3.5, -1.5, 0.0, 1.0, 3.5, 3.5]]))
    for column, want in enumerate([-7.0, 0.3, -0.2, -0.4, 0.1, 7.0]):
        to_scale, to_x = torch.autograd.grad(out[0, column], [scale, x], retain_graph=True)
        assert abs(float(to_scale) - want) < 1e-5
        inside = 0 < column < 5
        assert to_x[0, column] == float(inside) and to_x.count_nonzero() == inside


def test_against_torch() -> None:
    """torch's own learnable fake quantization: the same gradients of x, scale and zero point.

    It counts an element as inside when the rounded code is; we, when the element itself is. Elements between are left
    out.
    """
    q = Quantizer("uint8 channel symmetric=false")
    x = torch.randn(5, 400) * 2
    scale, zero = torch.rand(5, 1) * 0.01 + 0.01, torch.randint(60, 200, (5, 1)).float()
    y = x / scale + zero
    x = torch.where(((y < 0) & (y > -1)) | ((y > 255) & (y < 256)) | ((y - y.floor() - 0.5).abs() < 1e-3), 0.0, x)
    ours = {"x": x, "scale": scale, "zero": zero}
    theirs = {name: value.clone().flatten() if name != "x" else value.clone() for name, value in ours.items()}
    for value in (*ours.values(), *theirs.values()):
        value.requires_grad_()
    weight = torch.randn(5, 400)
    out = q.soft(x, QuantParams(scale, zero))
    learnable: Any = torch._fake_quantize_learnable_per_channel_affine
    want = learnable(*theirs.values(), 0, 0, 255, 1.0)
    assert torch.allclose(out, want, atol=1e-5)
    found, expected = derivatives(out, weight, ours), derivatives(want, weight, theirs)
    for name, value in expected.items():
        assert value.count_nonzero() > 0
        assert torch.allclose(found[name].flatten(), value.flatten(), rtol=1e-3, atol=1e-2)


def test_outer_scales_learn_too() -> None:
    """NVFP4: LSQ's formula one level up, for the scale of the scales."""
    q = Quantizer("nvfp4")
    x = torch.randn(8, 64)
    raw = q.soften(q.fit(x))
    assert raw.scale_params is not None and isinstance(raw.scale_params.scale, Tensor)
    assert isinstance(raw.scale, Tensor)
    outer = (raw.scale_params.scale * 0.7).requires_grad_()
    inner = raw.scale.clone().requires_grad_()
    out = q.soft(x, replace(raw, scale=inner, scale_params=QuantParams(outer)))
    assert same(out.detach(), q.fake_quantize(x, q.harden(replace(raw, scale_params=QuantParams(outer)))))
    weight = torch.randn(8, 64)
    to_inner, to_outer = derivatives(out, weight, {"inner": inner, "outer": outer}).values()
    y = raw.scale.double() / outer.detach().double()
    values = torch.from_numpy(np.array(get_format("float8_e4m3fn").grid))
    value = values[(y[..., None].clamp(2.0**-6) - values).abs().argmin(-1)]
    step = torch.where(y > 448, 448.0, value - y)
    assert (y > 448).any()
    assert torch.allclose(to_outer.double(), (to_inner * step).sum(), rtol=1e-3)


def test_stored_parameters_get_no_gradient_and_others_pass_it() -> None:
    """What training relies on: x alone, params None, an Inverse scale, a second derivative."""
    x = torch.randn(4, 64, requires_grad=True)
    q = Quantizer("nvfp4-ct")
    raw = q.soften(q.fit(x))
    assert raw.scale_params is not None and isinstance(raw.scale_params.scale, Inverse)
    divisor = raw.scale_params.scale.divisor.requires_grad_()
    to_divisor, to_x = torch.autograd.grad(q.soft(x, raw).square().sum(), [divisor, x])
    assert to_divisor.count_nonzero() == 1 and to_x.count_nonzero() > 0
    q = Quantizer("int4 token static")
    scale = dense(q.fit(x).scale).requires_grad_()  # type: ignore[arg-type]
    (first,) = torch.autograd.grad(q.soft(x, QuantParams(scale)).pow(3).sum(), scale, create_graph=True)
    assert torch.autograd.grad(first.sum(), scale)[0].count_nonzero() > 0


def test_the_hard_ones_have_no_gradient() -> None:
    q = Quantizer("nf4 channel")
    params = QuantParams(torch.ones(2, 1, requires_grad=True), grid=torch.randn(16).requires_grad_())
    x = torch.randn(2, 8, requires_grad=True)
    assert not q.fake_quantize(x, params).requires_grad
    assert not any(t.requires_grad for t in q.quantize(x, q.harden(params)).tensors().values())


def test_straight_through() -> None:
    value, surrogate = torch.tensor([-0.0, 0.1, 3e8]), torch.tensor([1.0, 3e8, 0.3], requires_grad=True)
    out = straight_through(value, surrogate)
    assert same(out.detach(), value)
    assert torch.equal(
        torch.autograd.grad((out * torch.tensor([1.0, 2.0, 3.0])).sum(), surrogate)[0], torch.tensor([1.0, 2.0, 3.0])
    )
    with pytest.raises(DataError, match="differ"):
        straight_through(value, surrogate[:1])


# ------------------------------------------------------------------------------------------------- learned roundings
DECIDED = [
    *("int4 group=32", "int4 group=32 symmetric=false", "float4_e2m1fn block=2x32", "nf4 flat=50", "nvfp4", "mxfp4"),
    *("float8_e4m3fn channel", "int8 group=48 pad=true symmetric=false", "float4_e2m1fn shifted", "linear4 rank1"),
    *("int4_full group=32 scale=minmax(offset=true)", "ternary scale=mean packing=base3", "nf4-dq", "nvfp4-ct"),
    *("float4_e2m1fn group=32 center=mean", "float4_e2m1fn group=32 reciprocal=true", "float16_e5m10 channel"),
]


@pytest.mark.parametrize("line", DECIDED)
def test_decided_codes_are_packed(line: str) -> None:
    """AdaRound's: up or down at will; what ``settle`` stores is what the forward said."""
    q = Quantizer(line)
    x = torch.randn(6, 4, 100) if "=50" in line or "=48" in line else torch.randn(6, 4, 64)
    raw = shrunk(q.soften(q.measured(x, None)), 0.8)
    up = q.granularity.to_blocks(torch.rand(x.shape)) < 0.5
    soft = q.granularity.to_blocks(torch.rand(x.shape)).requires_grad_()

    def decide(y: Tensor, grid: Grid) -> Tensor:
        lower, upper = grid.neighbours(y)
        assert ((lower <= y) | (y < grid.low)).all() and ((y < upper) | (y >= grid.high)).all()
        return torch.where(up, upper, lower)

    def between(y: Tensor, grid: Grid) -> Tensor:
        lower, upper = grid.neighbours(y)
        return lower + soft * (upper - lower)

    settled = q.settle(x, raw, decide)
    assert same(settled.dequantize(), q.soft(x, raw, decide))
    nearest_codes = q.quantize(x, q.harden(raw)).unpacked()
    assert 0.1 < (settled.unpacked() != nearest_codes).float().mean() < 0.9
    out = q.soft(x, raw, between)
    assert torch.autograd.grad(out.sum(), soft)[0].count_nonzero() > 0
    with pytest.raises(DataError, match="not on the grid"):
        q.settle(x, raw, between)


@pytest.mark.parametrize("line", DETERMINISTIC)
def test_settled_nearest_is_quantized(line: str) -> None:
    """The default rounding handed in by name: the codes of ``quantize``, -0 and zero points among them."""
    q = Quantizer(line)
    x = inputs(torch.float32)
    params = q.measured(x, None)
    want = q.quantize(x, params)
    for settled in (q.settle(x, q.soften(params), nearest), q.settle(x, params)):
        assert same(settled.unpacked(), want.unpacked()) and settled.spec() == want.spec()


def test_integers_by_hand() -> None:
    """Codes 0..15 around a zero point of 3: floor and floor + 1, held within."""
    q = Quantizer("uint4 channel symmetric=false")
    params = QuantParams(torch.ones(1, 1), torch.full((1, 1), 3.4))
    x = torch.tensor([[-9.0, -3.0, -2.5, 0.0, 11.2, 12.0, 40.0]])
    down = q.settle(x, params, lambda y, grid: grid.neighbours(y)[0])
    up = q.settle(x, params, lambda y, grid: grid.neighbours(y)[1])
    assert down.unpacked().tolist() == [[0, 0, 0, 3, 14, 15, 15]]
    assert up.unpacked().tolist() == [[0, 1, 1, 4, 15, 15, 15]]


def test_padding_decides_nothing() -> None:
    """A block's tail holds no element: what a rounding makes of it, a half here, need not be a value."""
    q = Quantizer("int4 flat=48")
    x = torch.randn(5, 10)
    real = q.granularity.mask(x.shape)
    assert real is not None

    def decide(y: Tensor, grid: Grid) -> Tensor:
        return torch.where(real, grid.nearest(y), 0.5)

    assert same(q.settle(x, None, decide).dequantize(), q.fake_quantize(x))


def test_a_rounding_of_another_shape() -> None:
    with pytest.raises(DataError, match="shape"):
        Quantizer("int4").soft(torch.randn(4, 4), round=lambda y, grid: y[:, :1])


@pytest.mark.parametrize("fmt", format_names())
def test_neighbours(fmt: str) -> None:
    """Against a search with numpy, for every kind of float32."""
    format_ = get_format(fmt)
    points = torch.from_numpy(format_.grid).float()
    y = torch.cat([points, torch.nextafter(points, points + 1), torch.nextafter(points, points - 1), random_bits(2000)])
    lower, upper = Grid(format_).neighbours(y)
    below = np.searchsorted(format_.grid, y.double().numpy(), side="right")
    finite = ~y.isnan()
    want = torch.from_numpy(format_.grid[np.clip(below - 1, 0, None)]).float()
    assert torch.equal(lower[finite], want[finite]) and lower[~finite].isnan().all()
    want = torch.from_numpy(format_.grid[np.clip(below, None, len(format_.grid) - 1)]).float()
    assert torch.equal(upper[finite], want[finite]) and upper[~finite].isnan().all()
    zeros = finite & (upper == 0) & (y < 0)
    assert (upper[zeros].signbit() == (format_.negative_zero is not None)).all()
    rounded = Grid(format_).nearest(y)
    assert same(rounded, torch.where(rounded == lower, lower, upper))
