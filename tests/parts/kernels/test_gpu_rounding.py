"""The Triton versions of the operations that round, against the readable ones, bit for bit.

On a GPU as they are, elsewhere in Triton's interpreter (``TRITON_INTERPRET=1``), which cuts bfloat16 off where a GPU
rounds it: what is written in bfloat16 is left to ``benchmarks/gpu_rounding.py`` there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.contracts.inputs import near_decisions, random_bits, same
from torch import Tensor

from nybble.formats import format_names, get_format
from nybble.ops import blocks as block_ops
from nybble.ops import measured, rounding, straight, tables
from nybble.ops.scaling import POW2_MODES
from nybble.rounding import REGISTRY, get_rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton is optional")
from nybble.kernels import gpu_rounding, gpu_scales, gpu_straight  # noqa: E402

# numpy, which the interpreter calculates with, says so of infinities and NaNs
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning")

FORMATS = [name for name in format_names() if get_format(name).bits <= 8][::4]
OF_EACH_KIND = ["float4_e2m1fn", "float8_e4m3fn", "float8_e5m2fnuz", "int4", "uint8", "nf4", "ufloat8_e4m4_finite"]
ROUNDINGS = [name for name in REGISTRY.names() if not get_rounding(name).stochastic]


def readable(op: Any) -> Callable[..., Any]:
    found: Callable[..., Any] = op._init_fn
    return found


def alike(fast: Tensor, op: Any, *args: Any) -> bool:
    return same(fast.cpu(), readable(op)(*args).cpu())


def hard_numbers(fmt: str) -> Tensor:
    points = near_decisions(get_format(fmt))
    some = points[torch.randperm(len(points))[:900]]
    return torch.cat([some, random_bits(122), torch.tensor([0.0, -0.0])]).to(DEVICE)


def blocks_of(count: int, elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal blocks among zero, subnormal, huge and non-finite ones."""
    x = torch.randn(count, elements)
    x[0], x[1] = 0, -0.0
    x[2] = torch.randint(-9, 9, (elements,)) * 2.0**-149
    x[3] *= 1e30
    x[4, -1], x[5, 0], x[6, 0] = torch.nan, torch.inf, -torch.inf
    return x.to(DEVICE, dtype)


@pytest.mark.parametrize("fmt", FORMATS)
def test_each_element(fmt: str) -> None:
    x = hard_numbers(fmt)
    assert alike(gpu_rounding.round_to(x, fmt, "nearest-even"), rounding.round_to, x, fmt, "nearest-even")
    assert alike(gpu_rounding.encode(x, fmt, "nearest-even"), rounding.encode, x, fmt, "nearest-even")
    lower, upper = gpu_rounding.around(x, rounding.grid_table(fmt, x.device), get_format(fmt).negative_zero is not None)
    below, above = tables.neighbours(x, fmt)
    assert same(lower, below) and same(upper, above)


@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize("fmt", OF_EACH_KIND[::2])
def test_every_rounding(fmt: str, name: str) -> None:
    if get_rounding(name).native and get_format(fmt).encoder_thresholds is None:
        return
    x = hard_numbers(fmt)
    assert alike(gpu_rounding.round_to(x, fmt, name), rounding.round_to, x, fmt, name)
    assert alike(gpu_rounding.encode(x, fmt, name), rounding.encode, x, fmt, name)


def test_wide_formats() -> None:
    x = torch.cat([random_bits(1000), torch.randn(24)]).to(DEVICE)
    for fmt in ("float16_e5m10", "float16_e8m7"):
        assert alike(gpu_rounding.round_to(x, fmt, "nearest-even"), rounding.round_to, x, fmt, "nearest-even"), fmt
        assert alike(gpu_rounding.encode(x, fmt, "nearest-even"), rounding.encode, x, fmt, "nearest-even"), fmt


def test_tables() -> None:
    x, values = hard_numbers("nf4"), torch.tensor([-1.5, -0.2, -0.0, 0.0, 0.3, 0.9, 1.1, 2.5], device=DEVICE)
    thresholds, ascending, codes = tables.decision_points(values, "nearest-even")
    assert alike(gpu_rounding.table_round(x, thresholds, ascending), tables.table_round, x, thresholds, ascending)
    found = gpu_rounding.table_encode(x, thresholds, codes)
    assert alike(found, tables.table_encode, x, thresholds, codes)
    assert alike(gpu_rounding.table_decode(found, values), tables.table_decode, found, values)
    found = found[1:].view(2, -1).t()
    assert alike(gpu_rounding.decode(found, "int3"), rounding.decode, found, "int3")


@pytest.mark.parametrize("name", ["nearest-even", "nearest-even-code", "half-up"])
def test_around_zero_points(name: str) -> None:
    y = torch.cat([torch.randn(40, 32) * 9, torch.arange(-32, 32).view(2, 32) / 2, random_bits(64).view(2, 32)])
    zero = torch.randint(0, 16, (len(y), 1)).float()
    for each in (zero, zero.expand_as(y).contiguous()):
        args = y.to(DEVICE), each.to(DEVICE), 0.0, 15.0, name
        assert alike(gpu_rounding.whole_codes(*args), rounding.whole_codes, *args)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((40, 32), torch.float16), ((9, 7), torch.float32), ((7, 3000), torch.float32), ((7, 70_000), torch.float16)],
    ids=str,
)
def test_blocks(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = blocks_of(*shape, dtype)
    for pow2, narrow in (("", "float32"), ("", "bfloat16"), ("", "float16"), ("floor", "float32")):
        args = x, "int4", 7.0, pow2, narrow
        assert alike(gpu_scales.dynamic_scale(*args), measured.dynamic_scale, *args), args[1:]
    for fmt in ("float4_e2m1fn", "nf4"):
        more = x, fmt, "nearest-even", get_format(fmt).absmax, "", "float16"
        assert alike(gpu_scales.dynamic_round(*more), block_ops.dynamic_round, *more), fmt


def test_narrowed() -> None:
    x = torch.cat([random_bits(500), torch.tensor([0.0, -0.0, 1e-30, -1e-41, 65519.0, -65520.0, torch.inf])])
    for dtype in ("float16", "bfloat16"):
        args = x.to(DEVICE), dtype
        assert alike(gpu_scales.narrowed(*args), block_ops.narrowed, *args), dtype


@pytest.mark.parametrize("mode", POW2_MODES)
@pytest.mark.parametrize("fmt", ["float8_e5m2", "ufloat3_e2m1b4_finite", "int8"])
def test_powers_of_two(fmt: str, mode: str) -> None:
    x = torch.cat([blocks_of(40, 8), random_bits(800).view(-1, 8).to(DEVICE)])
    args = x, fmt, 1.0, mode, "bfloat16"
    assert alike(gpu_scales.dynamic_scale(*args), measured.dynamic_scale, *args)


def test_formats_without_a_zero() -> None:
    x = blocks_of(40, 16)
    for pow2 in ("", "floor"):
        args = x, "binary", "nearest-even", 1.0, pow2, "float32"
        assert alike(gpu_scales.dynamic_round(*args), block_ops.dynamic_round, *args)


@pytest.mark.parametrize("extreme", ["none", "zero", "tiny", "nan", "inf"])
def test_nested_scales(extreme: str) -> None:
    x = torch.randn(300, 16) * torch.exp(torch.randn(300, 1))
    if extreme != "none":
        x[7] = {"zero": 0.0, "tiny": 1e-42, "nan": torch.nan, "inf": torch.inf}[extreme]
    x = x if extreme not in ("zero", "tiny") else x * (x[7] if extreme == "zero" else 1e-38)
    for inner, most, least in (("float8_e4m3fn", 448.0, 2.0**-6), ("float8_e5m2", 57344.0, 0.0)):
        args = x.to(DEVICE), 6.0, inner, most, least
        assert alike(gpu_scales.nested_scale(*args), measured.nested_scale, *args)


@pytest.mark.parametrize("fmt", OF_EACH_KIND)
def test_given_scales(fmt: str) -> None:
    x = blocks_of(12, 40)
    scales = [torch.rand(12, 1), torch.rand(1, 40) - 0.5, torch.rand(40, 12).t(), torch.rand(1, 1)]
    scales[0][:3] = torch.tensor([[0.0], [1e-41], [1e38]])
    for scale in scales:
        for reciprocal in (False, True):
            args = x, scale.to(DEVICE), fmt, "nearest-even", reciprocal
            assert alike(gpu_straight.scaled_round(*args), block_ops.scaled_round, *args), (scale.shape, reciprocal)


@pytest.mark.parametrize("far", [True, False])
@pytest.mark.parametrize(
    ("fmt", "name", "zero", "shift"),
    [
        ("float4_e2m1fn", "nearest-even", False, False),
        ("float4_e2m1fn", "nearest-even", False, True),
        ("nf4", "half-away", False, True),
        ("int4", "nearest-even", False, True),
        ("uint4", "nearest-even", True, True),
        ("uint4", "nearest-even-code", True, False),
        ("int4_full", "half-up", True, True),
    ],
)
def test_forward_and_backward(fmt: str, name: str, zero: bool, shift: bool, far: bool) -> None:
    """Scales' gradients are sums, whose order differs; all else is the same bits."""
    x, gradient = blocks_of(40, 48) * 3, torch.randn(40, 48, device=DEVICE)
    scale = torch.rand(40, 1, device=DEVICE) + 0.1
    scale[11] = 0
    zeros = torch.randint(0, 15, (40, 1), device=DEVICE).float() if zero else None
    shifts = torch.rand(40, 48, device=DEVICE) - 0.5 if shift else None
    args = x, scale, zeros, shifts, fmt, name
    assert alike(gpu_straight.straight_round(*args), straight.straight_round, *args)
    for for_scale in (True, False):
        more = gradient, *args, far, True, for_scale
        fast, slow = gpu_straight.straight_round_backward(*more), readable(straight.straight_round_backward)(*more)
        assert same(fast[0], slow[0]) and same(fast[2], slow[2])
        assert torch.allclose(fast[1], slow[1], rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("zero", [False, True])
def test_sums_of_blocks_that_several_programs_share(zero: bool) -> None:
    """Each scale's gradient is within float32's sums of as many terms; what it is multiplied with is in it."""
    x, gradient = torch.randn(2, 2, 66_001, device=DEVICE)
    scale = torch.tensor([[0.3], [0.05]], device=DEVICE)
    zeros = torch.tensor([[3.0], [9.0]], device=DEVICE) if zero else None
    args = gradient, x, scale, zeros, None, "uint4" if zero else "int4", "nearest-even", False, True, True, 0.125
    fast, slow = gpu_straight.straight_round_backward(*args), readable(straight.straight_round_backward)(*args)
    assert same(fast[0], slow[0]) and fast[1].shape == scale.shape
    # A term is at most |gradient| (|value| + |y|), each inside the range; in a sum by trees it meets few roundings.
    terms = 2 * gradient.double().abs() * (x / scale).double().abs().clamp(max=16)
    assert ((fast[1] - slow[1]).abs() <= 0.125 * 64 * 2.0**-24 * terms.sum(1, keepdim=True)).all()
    assert (fast[1] != 0).all()


def test_results_of_a_narrower_dtype() -> None:
    """Rounded in float32, then cast: one pass over memory instead of two."""
    x, scale = blocks_of(12, 40), torch.rand(12, 1, device=DEVICE)
    args = x, scale, None, None, "int4", "nearest-even", torch.float16
    fast = gpu_straight.straight_round(*args)
    assert fast.dtype == torch.float16 and alike(fast, straight.straight_round, *args)
    half = (x.half(), *args[1:6], torch.float32)  # twice: what float16 rounds off stays so
    assert alike(gpu_straight.straight_round(*half), straight.straight_round, *half)
    gradient = torch.randn(12, 40, device=DEVICE).half()
    more = gradient, *args[:6], False, True, False
    fast, slow = (
        f(*more)[0] for f in (gpu_straight.straight_round_backward, readable(straight.straight_round_backward))
    )
    assert fast.dtype == torch.float32 and same(fast, slow)


def test_half_precision_is_read() -> None:
    x = torch.randn(33, 16).bfloat16().to(DEVICE)
    args = x, "float4_e2m1fn", 6.0, "", "float32"
    assert alike(gpu_scales.dynamic_scale(*args), measured.dynamic_scale, *args)
