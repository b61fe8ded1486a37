"""Facts that no single value shows: errors on known distributions, bits per weight, identities among formats."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nybble.formats import format_names, get_format
from nybble.ops.rounding import round_stochastic
from nybble.qtensor import QTensor
from nybble.quantizer import Quantizer

SAMPLES = 200_000


def relative_error(x: Tensor, line: str) -> float:
    """Error power over signal power."""
    error = Quantizer(line).fake_quantize(x) - x
    return float(error.double().square().mean() / x.double().square().mean())


def student(freedom: int, count: int) -> Tensor:
    """Unit-less Student-t: normal over the root of a mean of squares."""
    return torch.randn(count) / torch.randn(count, freedom).square().mean(1).sqrt()


def drawn(kind: str) -> Tensor:
    """SAMPLES values of a distribution."""
    if kind.startswith("t"):
        return student(int(kind[1:]), SAMPLES)
    if kind == "uniform":
        return torch.rand(SAMPLES) * 2 - 1
    return laplace(SAMPLES) if kind == "laplace" else torch.randn(SAMPLES)


def laplace(count: int) -> Tensor:
    return torch.empty(count).exponential_() * torch.randint(2, (count,)).mul(2).sub(1)


# ------------------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("line", "want"),
    [("nf4", 0.0085), ("float4_e2m1fn", 0.0113), ("int4", 0.0116), ("fp4_bnb", 0.0150), ("dybit4", 0.0258)],
)
def test_normal_blocks_of_64(line: str, want: float) -> None:
    """N(0, 1), blocks of 64, absmax scales. The sheets' own samples were smaller than these 2^21: 1.5 %."""
    x = torch.randn(2**15, 64)
    error = (Quantizer(f"{line} group=64").fake_quantize(x) - x).square().mean().item()
    assert error == pytest.approx(want, rel=0.015)


def test_normal_blocks_in_order() -> None:
    x = torch.randn(2**13, 64)
    errors = [relative_error(x, f"{line} group=64") for line in ("nf4", "float4_e2m1fn", "int4", "fp4_bnb", "dybit4")]
    assert errors == sorted(errors)


def test_dybit_needs_a_searched_scale() -> None:
    """Most values lie in the linear part below 1: the best scale is above max|x| / 4, beyond the fraction 1."""
    x = torch.randn(2**13, 64)
    searched, narrow, absmax = (
        relative_error(x, f"dybit4 group=64{scale}")
        for scale in (" scale=mse(low=0.5,high=4,grid=70)", " scale=mse", "")
    )
    assert searched < 0.51 * narrow and narrow <= absmax


@pytest.mark.parametrize(
    ("kind", "bits", "dybit", "integer", "spread"),
    [  # DyBit sheet, faithful check 4; the last column is what the tails move from sample to sample
        ("normal", 4, 0.0152, 0.0132, 0.03),
        ("laplace", 4, 0.0221, 0.0269, 0.04),
        ("t5", 4, 0.0240, 0.0367, 0.12),
        ("normal", 8, 7.2e-5, 8.3e-5, 0.12),
        ("laplace", 8, 1.05e-4, 3.2e-4, 0.2),
    ],
)
def test_dybit_against_integers(kind: str, bits: int, dybit: float, integer: float, spread: float) -> None:
    """Relative error with a searched per-tensor scale; who wins on which tails."""
    x = drawn(kind)
    search = "mse(low=0.005,high=4,grid=400)" if bits == 4 else "mse(low=0.1,high=40,grid=400)"
    found = [relative_error(x, f"{fmt}{bits} scale={search}") for fmt in ("dybit", "int")]
    assert found == [pytest.approx(dybit, rel=spread), pytest.approx(integer, rel=spread)]
    assert (found[0] < found[1]) == (dybit < integer)


def test_dybit_on_very_heavy_tails() -> None:
    """t(3) has no fourth moment, so its numbers (0.083, 0.125) do not settle: the order is all that can be held."""
    x = student(3, SAMPLES)
    dybit, integer = (relative_error(x, f"{fmt}4 scale=mse(low=0.001,grid=400)") for fmt in ("dybit", "int"))
    assert dybit < 0.8 * integer


@pytest.mark.parametrize(
    ("kind", "best", "want"), [("uniform", "e1m2", 0.0045), ("normal", "e2m1", 0.0127), ("t3", "e3m0", 0.0385)]
)
def test_format_follows_distribution(kind: str, best: str, want: float) -> None:
    """LLM-FP4 sheet, check 4: normalised squared error with the best clip, and who wins."""
    x = drawn(kind)
    line = "{} scale=mse(low=0.01,high=1.1,grid=200)"
    errors = {fmt: relative_error(x, line.format(fmt)) for fmt in ("e1m2", "e2m1", "e3m0")}
    assert min(errors, key=lambda fmt: errors[fmt]) == best
    assert errors[best] == pytest.approx(want, rel=0.35 if kind == "t3" else 0.03)


def test_search_helps_on_heavy_tails() -> None:
    """LLM-FP4 sheet, check 3: Student-t(5), E2M1: at least a quarter better than min-max."""
    x = student(5, 4096)
    assert relative_error(x, "e2m1 scale=mse(low=0.1,grid=100)") < 0.75 * relative_error(x, "e2m1")


# -------------------------------------------------------------------------------------------------------- stochastic
@pytest.mark.parametrize("name", ["float4_e2m1fn", "int4", "nf4", "float8_e5m2", "dynamic4", "linear4", "dybit4"])
def test_stochastic_rounding_is_unbiased(name: str) -> None:
    """The share of upper neighbours among 1e5 draws is the distance, within 5 standard errors."""
    fmt = get_format(name)
    grid = torch.from_numpy(fmt.grid.copy()).float()
    draws = 100_000
    generator = torch.Generator().manual_seed(7)
    for index in (0, len(grid) // 3, len(grid) // 2, len(grid) - 2):
        low, high = grid[index].item(), grid[index + 1].item()
        for share in (0.1, 0.5, 0.97):
            x = torch.full((draws,), low + share * (high - low))
            y = round_stochastic(x, name, generator).double()
            assert set(y.tolist()) == {low, high}
            p = (x[0].double().item() - low) / (high - low)
            sigma = math.sqrt(p * (1 - p) / draws)
            assert abs((y == high).double().mean().item() - p) < 5 * sigma


def test_stochastic_quantizer_is_unbiased() -> None:
    """With scales and an integer zero point too; the mean error of an element goes down as the root of the draws."""
    generator = torch.Generator().manual_seed(0)
    for line in ("float4_e2m1fn group=32 rounding=stochastic", "int4 group=32 symmetric=false rounding=stochastic"):
        q = Quantizer(line)
        x = torch.randn(1, 32).expand(20_000, 32).contiguous()
        out = q.fake_quantize(x, generator=generator)
        params = q.fit(x[:1])
        assert isinstance(params.scale, Tensor)
        step = params.scale.item() * (2 if "e2m1" in line else 1)
        inside = x[0].abs() < x[0].abs().amax()  # the extremes sit on the grid, or clip by rounding
        bias = (out.double().mean(0) - x[0]).abs()[inside]
        assert bias.max() < 5 * step / 2 / math.sqrt(20_000)
    values = torch.arange(-7.0, 8)[None].repeat(1000, 1)
    for line in (
        "int8_full tensor symmetric=false rounding=stochastic",
        "int8 rounding=stochastic scale=absmax(target=7)",
    ):
        q = Quantizer(line)
        if "absmax" in line:
            assert torch.equal(q.fake_quantize(values, generator=generator), values), "a value of the grid moved"


# ----------------------------------------------------------------------------------------------------- bits per weight
@pytest.mark.parametrize(
    ("line", "bits"),
    [  # number-formats sheet, sections 0, 7, 10 and 11, from the bytes of a [256, 4096] tensor
        *(("mxfp8", 8.25), ("mxfp6", 6.25), ("mxfp4", 4.25), ("mxint8", 8.25)),
        *(
            ("nf4-bnb", 4.5),
            ("fp4-bnb", 4.5),
            ("state8", 8.125),
            ("dynamic8 flat=2048 scale_format=float32", 8.016),
            ("state4", 4.25),
        ),
        *(
            ("int4 group=128 scale_format=float16", 4.125),
            ("int4 group=128 symmetric=false scale_format=float16", 4.156),
        ),
        *(
            ("bfp12", 4.25),
            ("int4 group=128 scale=pow2 scale_format=(float8_e8m0fnu scale=one)", 4.0625),
            ("bfp10", 2.25),
        ),
        *(("msfp12", 4.5), ("msfp16", 8.5), ("bfp16", 8.25), ("bfp14", 6.25)),
        ("int8 group=8 scale=pow2 scale_format=(float8_e8m0fnu scale=one)", 9),
        ("int2 group=16 scale=pow2 scale_format=(float8_e8m0fnu scale=one)", 2.5),
        *(
            ("binary group=128 scale=mean scale_format=float16", 1.125),
            ("ternary group=128 scale_format=float16", 2.125),
        ),
        ("ternary group=128 scale_format=float16 packing=base3", 1.6 + 0.125),
        ("uint4 group=32 scale=minmax(offset=true) scale_format=float16 offset_format=float16", 5.0),
        ("int4_full group=32 scale=extreme scale_format=float16", 4.5),
        ("int8 group=32 scale_format=float16", 8.5),
    ],
)
def test_bits_per_weight(line: str, bits: float) -> None:
    packed = Quantizer(line).quantize(torch.randn(256, 4096))
    assert packed.bits_per_element() == pytest.approx(bits, abs=5e-4)


@pytest.mark.parametrize(
    ("line", "bits", "constants"),
    [("nvfp4", 4.5, 32), ("nvfp4-ct", 4.5, 32), ("nf4-dq", 4.127, 32), ("nf4-bnb-dq", 4.127, 32)],
)
def test_bits_per_weight_with_a_constant_for_the_tensor(line: str, bits: float, constants: int) -> None:
    n = 256 * 4096
    packed = Quantizer(line).quantize(torch.randn(256, 4096))
    assert packed.bits_per_element() - constants / n == pytest.approx(bits, abs=5e-4)


def test_short_blocks_own_their_scales() -> None:
    """Partial blocks: no padding element is stored."""
    packed = Quantizer("int4 group=128 pad=true scale_format=float16").quantize(torch.randn(10, 576))
    assert packed.nbytes() == 10 * 576 // 2 + 10 * 5 * 2
    packed = Quantizer("int3 flat=64").quantize(torch.randn(7, 9))
    assert packed.nbytes() == math.ceil(63 * 3 / 8) + 2


# ---------------------------------------------------------------------------------------------------------- identities
@pytest.mark.parametrize("m", range(1, 7))
def test_e1my_is_an_integer_grid(m: int) -> None:
    """Section 16.8: E1My equals a sign-magnitude integer grid."""
    fmt, integer = get_format(f"e1m{m}"), get_format(f"int{m + 2}")
    assert (fmt.grid / fmt.smallest).tolist() == integer.grid.tolist()
    x = torch.randn(64, 64)
    assert torch.allclose(
        Quantizer(f"e1m{m} group=32").fake_quantize(x), Quantizer(f"int{m + 2} group=32").fake_quantize(x)
    )


def test_mxint8_in_blocks_of_8_is_bfp16() -> None:
    """step = 2^(E + 1 - m), q = clamp(round(x / step), +-(2^m - 1)), E = floor(log2 max|x|) (sections 4 and 10)."""
    x = torch.randn(64, 64)
    x[0] = 1.9999
    exponent = torch.frexp(x.view(64, 8, 8).abs().amax(-1, keepdim=True))[1] - 1
    step = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - 6)
    want = ((x.view(64, 8, 8) / step).round().clamp(-127, 127) * step).view(64, 64)
    assert torch.equal(Quantizer("mxint8", group=8).fake_quantize(x), want)
    assert torch.equal(Quantizer("bfp16", group=8).fake_quantize(x), want)


def test_bfp12_by_its_definition() -> None:
    """K-sort sheet: e = floor(log2 max|x|), step = 2^(e - (p - 2)), L = 2^(p - 1) - 1."""
    x = torch.randn(16, 64)
    exponent = torch.frexp(x.view(16, 2, 32).abs().amax(-1, keepdim=True))[1] - 1
    step = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - 2)
    assert torch.equal(
        Quantizer("bfp12").fake_quantize(x), ((x.view(16, 2, 32) / step).round().clamp(-7, 7) * step).view(16, 64)
    )


def test_e4m3fn_is_generic_e4m3_minus_its_top_code() -> None:
    fn, generic = get_format("float8_e4m3fn"), get_format("float8_e4m3_finite")
    assert fn.grid.tolist() == generic.grid.tolist()[1:-1]


def test_fnuz_is_fn_halved() -> None:
    """Section 1: same bit patterns, a factor 2 in value; fn's NaN is fnuz's largest."""
    fn, fnuz = get_format("float8_e4m3fn").values, get_format("float8_e4m3fnuz").values
    plain = [c for c in range(256) if c not in (0x7F, 0xFF, 0x80)]
    assert (fn[plain] == 2 * fnuz[plain]).all()


@pytest.mark.parametrize("line", ["mxfp4", "mxfp6", "mxfp8", "mxint8", "bfp12", "mxfp4-ct"])
@pytest.mark.parametrize("power", [-20, -1, 3, 30])
def test_mx_scaling_invariance(line: str, power: int) -> None:
    x = torch.randn(8, 64)
    q = Quantizer(line)
    a, b = q.quantize(x), q.quantize(x * 2.0**power)
    assert torch.equal(a.codes, b.codes) and torch.equal(b.dequantize(), a.dequantize() * 2.0**power)
    assert isinstance(a.params.scale, QTensor) and isinstance(b.params.scale, QTensor)
    assert not torch.equal(a.params.scale.tensors()["codes"], b.params.scale.tensors()["codes"])


def test_mx_floor_rule_clips_where_the_sheet_says() -> None:
    """Section 4: block maxima with mantissa above max / 2^emax clip: E2M1 above 1.5 (7.9 -> 6)."""
    x = torch.zeros(1, 32)
    for line, top, got in (
        ("mxfp4-ocp", 7.9, 6.0),
        ("mxfp4-ocp", 6.0, 6.0),
        ("mxfp8", 1.99, 1.75),
        ("mxfp6", 1.99, 1.875),
        ("mxint8", 1.999, 127 / 64),
    ):
        x[0, 0] = top
        assert Quantizer(line).fake_quantize(x)[0, 0].item() == got


def test_formats_are_told_apart_by_type_not_by_value() -> None:
    """Section 16.8: NF4 and FP4 codes do not pass for E2M1's."""
    names = format_names()
    assert len({get_format(name) for name in names}) == len(names)
    assert get_format("fp4_bnb") != get_format("e2m1") and get_format("nf4") != get_format("af4")
