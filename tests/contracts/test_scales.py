"""What every scale rule must do, alone and inside a Quantizer."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from nybble.core.errors import FormatError, SchemeError, UsageError
from nybble.formats import get_format
from nybble.ops.blocks import divide
from nybble.ops.rounding import decode, round_to
from nybble.ops.scaling import POW2_MODES, pow2_scale
from nybble.qtensor import Factored, QTensor, QuantParams, dense
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.scales import REGISTRY, BlockParams, ScaleRule, parse_scale_rule
from nybble.scales.absmax import AbsMax
from nybble.scales.mse import Mse
from nybble.scales.stored import Stored

RULES = [*REGISTRY.names(), *(f"{name}(offset=true)" for name in ("cfp", "least-squares", "mean", "minmax", "mse"))]
FORMATS = (
    "float4_e2m1fn",
    "int4",
    "int4_full",
    "uint8",
    "nf4",
    "float8_e4m3fn",
    "dybit4",
    "binary",
    "linear4",
    "int1_full",
)
VANISHING = ("zero", "constant", "subnormal", "one subnormal", "mixed", "tiny")
"""Among :func:`blocks`, those without a magnitude, or a range, to speak of."""


def blocks() -> dict[str, Tensor]:
    """float32 [blocks, 32] by what is hard about them."""
    normal = torch.randn(8, 32)
    outlier = normal.clone()
    outlier[:, 5] = 1e4
    return {
        "normal": normal,
        "zero": torch.zeros(2, 32),
        "constant": torch.full((2, 32), 0.37) * torch.tensor([[1.0], [-1.0]]),
        "outlier": outlier,
        "positive": normal.abs() + 1,
        "tiny": normal * 1e-38,
        "huge": normal.clamp(-1.6, 1.6) * 1e38,
        "subnormal": normal.sign() * torch.linspace(1, 40, 32).floor() * 2.0**-149,
        "one subnormal": torch.eye(4, 32) * 2.0**-149,
        "mixed": torch.cat([normal[:2], torch.zeros(1, 32), normal[:1] * 1e-38, normal[:1].clamp(-1.6, 1.6) * 1e38]),
    }


def rule_of(name: str) -> ScaleRule:
    return parse_scale_rule(name)


def fitted(rule: ScaleRule, x: Tensor, fmt: str, weight: Tensor | None = None) -> BlockParams | None:
    """What the rule finds, or None where it takes no such format."""
    try:
        return rule.fit(x, get_format(fmt), "nearest-even", weight)
    except FormatError:
        return None


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", RULES)
def test_alone(name: str, fmt: str) -> None:
    """One finite parameter a block; only a block with no magnitude to speak of may get scale 0."""
    rule = rule_of(name)
    if rule.needs_integer and not get_format(fmt).is_integer:
        return
    for what, x in blocks().items():
        found = fitted(rule, x, fmt)
        if found is None:
            continue
        for value in (found.scale, found.zero_point, found.offset):
            assert value is None or (value.shape == (len(x), 1) and value.dtype == torch.float32), what
            assert value is None or value.isfinite().all(), what
        if what not in VANISHING:
            assert (found.scale != 0).all(), what
        again = rule.fit(x.clone(), get_format(fmt), "nearest-even")
        assert torch.equal(again.scale, found.scale), f"{what}: not deterministic"


@pytest.mark.parametrize("scale_format", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", RULES)
def test_in_a_quantizer(name: str, fmt: str, scale_format: str) -> None:
    """Stored scales are finite, positive but where the rule puts a sign on them, and 0 only in a format without a zero.

    Values stay finite, and a block of zeros stays one.
    """
    rule = rule_of(name)
    words = f"scale={name}" + ("" if name in ("one", "pow2-ratio") else f" scale_format={scale_format}")
    if rule.two_level:
        words = f"scale={name} scale_format=(float8_e4m3fn tensor)"
    if rule.has_offset or rule.needs_integer:
        words += f" offset_format={scale_format}"
    try:
        q = Quantizer(f"{fmt} group=32 {words}")
    except SchemeError:
        assert (rule.needs_integer and not get_format(fmt).is_integer) or (
            rule.two_level and isinstance(scale_format, Quantizer)
        )
        return
    for what, x in blocks().items():
        try:
            params = q.fit(x)
        except FormatError:
            assert not get_format(fmt).signed if name == "extreme" else not get_format(fmt).has_zero
            continue
        out = q.fake_quantize(x)
        # Half-precision scales of 1e38 saturate; only then may an element leave the float32 range.
        assert out.isfinite().all(), what
        if params.scale is None:
            assert name == "one"
            continue
        assert not isinstance(params.scale, Factored)
        assert isinstance(params.scale, Tensor | QTensor)
        scale = dense(params.scale)
        assert scale.isfinite().all(), what
        if 0 in get_format(fmt).grid or what not in VANISHING:
            assert (scale != 0).all(), what
        if name.partition("(")[0] not in ("extreme", "least-squares"):
            assert (scale >= 0).all(), what
        if what == "zero":
            assert (out == 0).all()


@pytest.mark.parametrize("line", ["channel", "group=24 pad=true"])
@pytest.mark.parametrize("name", RULES)
def test_sizes_are_known_before_values(name: str, line: str) -> None:
    """What pre-flight counts on a tensor without values is what is stored."""
    for fmt in FORMATS:
        try:
            quantizer = Quantizer(f"{fmt} {line} scale={name}")
            stored = quantizer.quantize(torch.randn(2, 64)).nbytes()
        except (FormatError, SchemeError):
            continue
        assert quantizer.stored_bytes((2, 64)) == stored


@pytest.mark.parametrize("name", RULES)
def test_nan_reaches_the_result(name: str) -> None:
    rule = rule_of(name)
    for fmt in FORMATS:
        if name == "one" or (rule.needs_integer and not get_format(fmt).is_integer):
            continue
        words = f"scale={name}" + (" scale_format=(float8_e4m3fn tensor)" if rule.two_level else "")
        x = torch.randn(2, 32)
        x[0, 3] = torch.nan
        try:
            q = Quantizer(f"{fmt} group=32 {words}")
            assert q.fake_quantize(x)[0].isnan().any(), (name, fmt)
            assert q.quantize(x).dequantize()[0].isnan().any(), (name, fmt)
        except FormatError:
            assert name in ("extreme", "pow2-ratio")


@pytest.mark.parametrize("name", RULES)
def test_padding_takes_no_part(name: str) -> None:
    """A short block gets the parameters that it would get alone (weight 0 on what is padded)."""
    rule = rule_of(name)
    if name == "one":
        return
    x = torch.randn(1, 20) + 3
    padded = torch.nn.functional.pad(x, (0, 12))
    mask = (torch.arange(32) < 20).float()[None]
    for fmt in ("int4_full", "uint8"):
        alone, short = fitted(rule, x, fmt), fitted(rule, padded, fmt, mask)
        if alone is None or short is None:
            assert name == "extreme"
            continue
        for a, b in ((alone.scale, short.scale), (alone.zero_point, short.zero_point), (alone.offset, short.offset)):
            assert (a is None) == (b is None)
            # means add up in another order
            assert a is None or b is None or torch.allclose(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", RULES)
def test_text_leads_back(name: str) -> None:
    rule = rule_of(name)
    assert str(rule) == name and rule_of(str(rule)) == rule
    assert type(rule).__doc__


def test_options_keep_every_digit() -> None:
    for rule in (Mse(grid=7, low=0.123456789, high=1.1), AbsMax(target=7.5), AbsMax(target=1e-7), Mse(p=2.4)):
        assert parse_scale_rule(str(rule)) == rule
    assert str(AbsMax(target=7.5)) == "absmax(target=7.5)"


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("p", [2.0, 2.4])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fmt", ["int4_full", "float4_e2m1fn", "nf4", "dybit4"])
def test_mse_is_never_worse_than_absmax(fmt: str, weighted: bool, p: float, asymmetric: bool) -> None:
    """On the objective it states, block by block; and better somewhere, or the search is a no-op."""
    form = get_format(fmt)
    if asymmetric and not form.is_integer:
        return
    rule = Mse(p=p, asymmetric=asymmetric)
    better = 0
    for what, x in blocks().items():
        if what in ("huge", "mixed"):  # squares overflow: nothing can be less
            continue
        weight = torch.rand(x.shape) if weighted else None

        def loss(found: BlockParams, x: Tensor = x, weight: Tensor | None = weight) -> Tensor:
            y = divide(x, found.scale, reciprocal=False)
            if found.zero_point is None:
                value = round_to(y, fmt, "nearest-even")
            else:
                code = (torch.round(y) + found.zero_point).clamp(form.min, form.max)
                value = code - found.zero_point
            error: Tensor = (value * found.scale - x).abs().double() ** p
            return (error if weight is None else error * weight).sum(1)

        start = Mse(grid=1, low=0.9999, high=1.0, p=p, asymmetric=asymmetric).fit(x, form, "nearest-even", weight)
        base = rule_of("minmax" if asymmetric else "absmax").fit(x, form, "nearest-even", weight)
        found, least = loss(rule.fit(x, form, "nearest-even", weight)), loss(base)
        assert start.scale.shape == base.scale.shape
        # the search adds up in float32: allow its rounding
        assert (found <= least * (1 + 1e-5)).all(), what
        better += int((found < least * 0.99).sum())
    assert better > 0, "the search found nothing"


@pytest.mark.parametrize("mode", POW2_MODES)
@pytest.mark.parametrize(
    "fmt",
    [
        *("float4_e2m1fn", "float8_e4m3fn", "float8_e5m2", "float6_e2m3fn", "int8", "int4"),
        *("nf4", "dynamic4", "table[-0.4,0,0.3,0.75]", "table[-0.01,0.01]"),
    ],
)
def test_pow2_by_its_formula(fmt: str, mode: str) -> None:
    """The exponents by exact integer arithmetic in Python, over all binades, at and beside every power of two."""
    form = get_format(fmt)
    powers = torch.tensor([2.0**e for e in range(-149, 128)])
    factors = torch.tensor(
        [
            1.0,
            1.25,
            1.4999999,
            1.5,
            1.75,
            1.875,
            1.9375,
            1.9999999,
            form.absmax / 2 ** math.floor(math.log2(form.absmax)),
        ]
    )
    amax = (powers[:, None] * factors).reshape(-1)
    amax = torch.cat([amax, torch.nextafter(amax, torch.tensor(0.0)), torch.nextafter(amax, torch.tensor(torch.inf))])
    amax = amax[amax.isfinite() & (amax > 0)]
    emax = math.frexp(form.absmax)[1] - 1
    mantissa_bits = getattr(form, "m", 0)
    want = []
    for a in amax.tolist():
        m, e = math.frexp(a)  # a = m 2^e, m in [0.5, 1)
        if mode == "floor":
            exponent = e - 1 - emax
        elif mode == "ceil":
            exponent = (e - 1 if m == 0.5 else e) - emax
        elif mode == "even":
            carry = round(m * 2 ** (mantissa_bits + 1) + 1e-12) == 2 ** (mantissa_bits + 1)  # half up
            exponent = e - 1 + carry - emax
        elif mode == "nearest":
            exponent = math.frexp(a / form.absmax)[1] - 3
            while Fraction(a) ** 2 >= 2 * (Fraction(form.absmax) * Fraction(2) ** exponent) ** 2:
                exponent += 1
        elif mode == "rfloor":
            exponent = math.frexp(a / form.absmax)[1] - 3
            while form.absmax * 2.0 ** (exponent + 1) <= a:
                exponent += 1
        else:
            exponent = math.frexp(a / form.absmax)[1] - 3
            while form.absmax * 2.0**exponent < a:
                exponent += 1
        want.append(2.0 ** min(max(exponent, -127), 127))
    scale = pow2_scale(amax, form, mode)
    assert scale.tolist() == want
    special = pow2_scale(torch.tensor([0.0, torch.inf, torch.nan]), form, mode)
    assert special[0] == (2.0**-127 if 0 in form.grid else 0) and special[1:].isnan().all()
    if mode == "rceil":  # never saturates
        inside = (scale > 2.0**-127) & (scale < 2.0**127)
        assert (amax[inside] / scale[inside] <= form.absmax).all()


@pytest.mark.parametrize("mode", POW2_MODES)
def test_pow2_scaling_invariance(mode: str) -> None:
    """Multiplying the input by a power of two changes only the scale (sheet, check 16.7)."""
    q = Quantizer(f"float4_e2m1fn group=32 scale=pow2(mode={mode}) scale_format=(float8_e8m0fnu scale=one)")
    x = torch.randn(16, 64)
    first = q.quantize(x)
    for k in (-60, -1, 1, 7, 60):
        other = q.quantize(x * 2.0**k)
        assert torch.equal(other.codes, first.codes)
        assert isinstance(first.params.scale, QTensor) and isinstance(other.params.scale, QTensor)
        assert torch.equal(other.params.scale.dequantize(), first.params.scale.dequantize() * 2.0**k)
        assert torch.equal(other.dequantize(), first.dequantize() * 2.0**k)


def test_ranges_wider_than_float32() -> None:
    x = torch.tensor([[-3e38, 0.0, 3e38, 1e38]])
    out = Quantizer("int8 group=4 symmetric=false scale_format=float32").fake_quantize(x)
    assert (out - x).abs().max() <= 6e38 / 255


@pytest.mark.parametrize("line", ["nf4-bnb", "fp4-bnb", "float4_e2m1fn flat=64 reciprocal=true"])
def test_reciprocals_of_subnormal_scales(line: str) -> None:
    """1 / 1e-40 is infinite in float32, and infinity times the block's zeros NaN."""
    x = torch.zeros(1, 64)
    x[0, :2] = torch.tensor([1e-40, -5e-41])
    q = Quantizer(line)
    out = q.fake_quantize(x)
    assert out.isfinite().all() and (out[0, 2:] == 0).all()
    assert torch.equal(q.quantize(x).dequantize(), out)


def test_one_stores_nothing() -> None:
    assert Quantizer("float8_e4m3fn scale=one").fit(torch.randn(4, 4)) == QuantParams(None)


def test_two_level_needs_a_nested_format() -> None:
    with pytest.raises(SchemeError, match="two-level"):
        Quantizer("float4_e2m1fn group=16 scale=two-level")
    with pytest.raises(SchemeError, match="one scale of scales"):
        Quantizer("float4_e2m1fn group=16 scale=two-level scale_format=(float8_e4m3fn flat=8)")


@pytest.mark.parametrize("fmt", ["float4_e2m1fn", "float8_e4m3fn", "int8", "float6_e3m2fn"])
def test_pow2_search_takes_the_better_of_two(fmt: str) -> None:
    form, x = get_format(fmt), torch.randn(400, 32) * torch.exp(4 * torch.randn(400, 1))
    x[0] = 0
    weight = torch.rand(400, 32)
    errors = {}
    for mode in (*POW2_MODES, "search"):
        scale = rule_of(f"pow2(mode={mode})").fit(x, form, "nearest-even", weight).scale
        rounded = round_to(x / scale, fmt, "nearest-even") * scale
        errors[mode] = (
            ((rounded - x) / x.abs().amax(1, keepdim=True).clamp(min=1e-30)).double().square().mul(weight).sum(1)
        )
    for mode in ("floor", "even", "rceil"):
        assert (errors["search"] <= errors[mode] * (1 + 1e-5) + 1e-30).all(), mode
    q = Quantizer(f"{fmt} group=32 scale=pow2(mode=search) scale_format=(float8_e8m0fnu scale=one)")
    assert torch.equal(q.fake_quantize(x), q.quantize(x).dequantize())


@pytest.mark.parametrize(
    "line",
    [
        *("binary", "binary channel", "binary token", "binary group=16", "binary flat=16", "binary block=2x16"),
        *("binary rank1", "binary shifted=2", "binary group=16 raw_scale=true", "binary group=16 reciprocal=true"),
        *("table[-1,-0.3,0.3,1] group=16", "linear8 group=16", "binary group=16 scale=minmax(offset=true)"),
        *("binary group=16 scale_format=(float8_e4m3fn tensor)", "binary group=16 scale=mse scale_format=bfloat16"),
    ],
)
def test_zeros_in_a_format_without_a_zero(line: str) -> None:
    """A scale of 0 stands for them; the blocks beside keep theirs."""
    q = Quantizer(line)
    x = torch.randn(4, 32).abs() + 0.5
    plain = q.fake_quantize(x)
    x[:2] = 0
    out, whole = q.fake_quantize(x), q.fake_quantize(torch.zeros(4, 32))
    assert (whole == 0).all() and torch.equal(q.quantize(x).dequantize(), out)
    if q.granularity.word not in ("tensor", "shifted"):  # one block
        assert (out[:2] == 0).all() and (out[2:] != 0).all()
        if q.granularity.word not in ("rank1",) and "(float8" not in line:  # which see the other rows
            assert torch.equal(out[2:], plain[2:])


def test_a_range_of_one_value() -> None:
    """Its offset says all of it, so the values of the format count for nothing."""
    for fmt in ("binary", "int4", "table[-1,-0.3,0.3,1]"):
        q = Quantizer(f"{fmt} group=16 scale=minmax(offset=true)")
        assert (q.fake_quantize(torch.full((2, 16), 3.25)) == 3.25).all()


def test_zeros_can_learn() -> None:
    """Straight-through: where the scale is 0 the gradient goes past it; else a layer that begins at zero stays so."""
    x = torch.zeros(2, 16, requires_grad=True)
    out = Quantizer("binary group=16").soft(x)
    (out * torch.arange(32.0).view(2, 16)).sum().backward()  # type: ignore[no-untyped-call]
    assert (out == 0).all() and x.grad is not None and torch.equal(x.grad, torch.arange(32.0).view(2, 16))


E4M3 = "(float8_e4m3fn tensor floor=normal)"


@pytest.mark.parametrize(
    ("line", "codes"),
    [
        (f"float4_e2m1fn group=16 scale=stored(low=1,high=1.5,grid=8) scale_format={E4M3}", 7),
        (f"float4_e2m1fn group=16 scale=stored scale_format={E4M3}", 13),
        ("float4_e2m1fn group=32 scale=stored scale_format=(float8_e8m0fnu scale=one)", 2),
        ("nf3 group=32 scale=stored scale_format=(uint4 flat=8)", 10),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_stored_scales_by_brute_force(line: str, codes: int, weighted: bool) -> None:
    """The least error of all codes of the scales' format within the range, one by one, in float64; none is left out."""
    q = Quantizer(line)
    assert isinstance(q.scale_format, Quantizer) and isinstance(q.scale, Stored)
    x = torch.randn(64, 64) * torch.exp(torch.randn(64, 1))
    weight = torch.rand(64, 64) ** 4 if weighted else None
    found = q.fit(x, weight).scale
    assert isinstance(found, BlockQTensor)
    groups, size = x.view(-1, q.granularity.size), q.granularity.size  # type: ignore[attr-defined]
    importance = torch.ones_like(groups) if weight is None else weight.view(-1, size)

    def lost(scale: Tensor) -> Tensor:
        value = round_to(groups / scale, q.format.name, "nearest-even") * scale
        error: Tensor = (value.double() - groups) ** 2 * importance
        return error.sum(1)

    absmax = groups.abs().amax(1) / q.format.absmax
    outer = q.scale_format.fit(absmax.view(found.shape))
    base = q.scale_format.quantize(absmax.view(found.shape), outer)
    low, high = (
        q.scale_format.fake_quantize((absmax * by).view(found.shape), outer).flatten()
        for by in (q.scale.low, q.scale.high)
    )
    best, tried = lost(base.dequantize().view(-1, 1)), torch.zeros(len(groups))
    for code in range(2**q.scale_format.format.bits):
        every = q.scale_format.pack(torch.full(found.shape, code, dtype=torch.uint8), base.params)
        scale = every.dequantize().flatten()
        inside = (scale >= low) & (scale <= high) & (scale > 0)
        best = torch.where(inside, torch.minimum(best, lost(scale[:, None])), best)
        tried += inside
    got = lost(found.dequantize().view(-1, 1))
    assert torch.allclose(got, best, rtol=1e-5, atol=0) and int(tried.max()) >= codes
    assert (got < lost(base.dequantize().view(-1, 1))).float().mean() > 0.2


def test_four_over_six() -> None:
    """A block of one 5 among values at 4 loses nothing where its largest becomes 4; 256 leaves the largest its 1.5."""
    x = torch.full((2, 16), 3.0) * torch.tensor([[1.0], [0.5]])
    x[:, 0] *= 4 / 3  # 4 and 3: under a scale of 1 both are values of E2M1; under 2 / 3 they are 6 and 4.5
    plain, both = Quantizer("nvfp4").fake_quantize(x), Quantizer("nvfp4-46").quantize(x)
    assert (plain - x).abs().max() > 0.1
    scale = both.params.scale
    assert isinstance(scale, BlockQTensor)
    assert torch.equal(both.unpacked() & 7, torch.tensor([6] + [5] * 15).expand(2, -1))
    assert decode(scale.unpacked(), "float8_e4m3fn").flatten().tolist() == [384, 192]
    with_448 = Quantizer("nvfp4", scale="stored(low=1,high=1.5,grid=2)").quantize(x).params.scale
    assert isinstance(with_448, BlockQTensor)
    assert decode(with_448.unpacked(), "float8_e4m3fn").flatten().tolist() == [448, 320]  # the first can't


@pytest.mark.parametrize("text", ["stored(low=0)", "stored(low=2,high=1)", "stored(grid=0)", "stored(inner=-1)"])
def test_stored_refuses(text: str) -> None:
    with pytest.raises(UsageError, match=text.split("(")[0]):
        parse_scale_rule(text)
