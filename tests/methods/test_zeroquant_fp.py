"""ZeroQuant-FP's scale constraints (its sheet, checks 2 to 4): M1, M2, and the exact cast of FP4 to FP8."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from nybble.core.errors import SchemeError, UsageError
from nybble.ops.rounding import decode
from nybble.qtensor import dense
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.scales import parse_scale_rule

M2 = "float4_e2m1fn group=64 scale=pow2-ratio(mode={}) scale_format=(ufloat3_e3m0_finite channel floor=normal)"


def weights() -> Tensor:
    """float32 [64, 1024], Student's t with five degrees of freedom, rows and groups of different sizes."""
    torch.manual_seed(0)
    x = torch.distributions.StudentT(torch.tensor(5.0)).sample((64, 1024))
    return x * torch.exp2(torch.randn(64, 1)) * torch.exp2(torch.randn(64, 16).repeat_interleave(64, 1))


def scales(found: BlockQTensor) -> Tensor:
    """float64 [64, 16]."""
    assert isinstance(found.params.scale, Tensor | BlockQTensor)
    return dense(found.params.scale).double().view(64, 16)


def real(x: Tensor) -> Tensor:
    return x.view(64, 16, 64).abs().amax(-1).div(6).double()


def test_m1_is_the_next_power_of_two() -> None:
    x = weights()
    found, s = scales(Quantizer("fp4-m1").quantize(x)), real(x)
    assert torch.equal(found.log2(), found.log2().round())
    assert (found >= s).all() and (found < 2 * s).all()


@pytest.mark.parametrize("mode", ["down", "up", "nearest"])
def test_m2_is_the_formula(mode: str) -> None:
    """S_max stays, and all others are S_max / 2^k with k = ceil, floor or round of log2(S_max / S_i), at most 6."""
    x = weights()
    x[3, :64] /= 2.0**9  # further below the row's largest than three bits can say
    found, s = scales(Quantizer(M2.format(mode)).quantize(x)), real(x)
    largest = s.amax(1, keepdim=True)
    ratio = (largest / s).log2()
    k = {"down": ratio.ceil(), "up": ratio.floor(), "nearest": ratio.round()}[mode]
    assert k[3, 0] > 6 and (k[:3] <= 6).all()
    assert torch.equal(found, largest / torch.exp2(k.clamp(max=6)))
    if mode == "down":  # the preset's, and as published
        assert torch.equal(found, scales(Quantizer("fp4-m2").quantize(x)))
        inside = k <= 6
        assert (found <= s)[inside].all() and (2 * found > s)[inside].all()


def bits_by_shifting(code: int, k: int) -> int:
    """An E2M1 code over 2^k as an E4M3 code, by the arithmetic of exponents alone."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    if exponent == 0 and mantissa == 0:
        return sign << 7
    power = exponent - 1 - k if exponent else -1 - k
    fraction = mantissa << 2 if exponent else 0
    if power >= -6:
        return sign << 7 | power + 7 << 3 | fraction
    return sign << 7 | (8 | fraction) >> -6 - power  # a subnormal: the hidden bit is shifted in


def test_fp4_over_a_power_of_two_is_fp8() -> None:
    """All 16 codes and all admissible shifts; one more loses the half."""
    e2m1 = Quantizer("float4_e2m1fn scale=one").format.values
    for code, k in itertools.product(range(16), range(9)):
        value = torch.tensor(float(e2m1[code]) * 2.0**-k)
        cast = value.to(torch.float8_e4m3fn)
        assert cast.float() == value and int(cast.view(torch.uint8)) == bits_by_shifting(code, k)
        assert value.mul(2.0 ** (k - 15)).to(torch.float8_e5m2).float() == value.mul(2.0 ** (k - 15))
    assert torch.tensor(1.5 * 2.0**-9).to(torch.float8_e4m3fn).float() != 1.5 * 2.0**-9


def over_the_rows_scale(line: str, x: Tensor) -> Tensor:
    """float64 [64, 16, 64]: what FP8 units would read; times the row's largest scale it is what is stored."""
    found = Quantizer(line).quantize(x)
    largest, own = scales(found).amax(1, keepdim=True), scales(found)
    read: Tensor = decode(found.unpacked(), "float4_e2m1fn").double().view(64, 16, 64) * (own / largest)[..., None]
    torch.testing.assert_close((read.view(64, 1024) * largest).float(), found.dequantize(), rtol=1e-6, atol=0)
    return read


@pytest.mark.parametrize("line", ["fp4-m2", *(M2.format(mode) for mode in ("up", "nearest"))])
def test_every_value_over_the_rows_scale_is_an_fp8_value(line: str) -> None:
    x = weights()
    read, plain = over_the_rows_scale(line, x), over_the_rows_scale("float4_e2m1fn group=64", x)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        assert torch.equal(read.float().to(dtype).double(), read)
        assert not torch.equal(plain.float().to(dtype).double(), plain)


def test_m1_is_fp8_over_the_rows_largest_too() -> None:
    x = weights()
    found = scales(Quantizer("fp4-m1").quantize(x))
    near = (found.amax(1, keepdim=True) / found).log2() <= 8
    read = over_the_rows_scale("fp4-m1", x)[near]
    assert near.float().mean() > 0.9 and torch.equal(read.float().to(torch.float8_e4m3fn).double(), read)


def test_real_scales_lose_least_and_m2_less_than_m1() -> None:
    """The sheet's own calculation: 0.0182 real, 0.0320 M1, M2 0.0270 down, 0.0235 up, 0.0205 nearest."""
    torch.manual_seed(0)
    x = torch.distributions.StudentT(torch.tensor(5.0)).sample((512, 2048))
    lines: dict[str, str | Quantizer] = {
        "real": "float4_e2m1fn group=256 scale_format=float32", "m1": "fp4-m1 group=256",
        **{mode: Quantizer(M2.format(mode)).replace(group=256) for mode in ("down", "up", "nearest")},
    }  # fmt: skip
    lost = {n: float((Quantizer(q).fake_quantize(x) - x).square().sum() / x.square().sum()) for n, q in lines.items()}
    assert lost["real"] < lost["nearest"] < lost["up"] < lost["down"] < lost["m1"]
    for name, wanted in {"real": 0.0182, "m1": 0.0320, "down": 0.0270, "up": 0.0235, "nearest": 0.0205}.items():
        assert lost[name] == pytest.approx(wanted, rel=0.15)  # how many scales share one, it doesn't say


def test_refusals() -> None:
    for scale_format in ("float16", "(float8_e4m3fn channel)"):
        with pytest.raises(SchemeError, match=r"pow2-ratio.* is none\..*scale_format=\(ufloat3_e3m0_finite"):
            Quantizer(f"float4_e2m1fn group=64 scale=pow2-ratio scale_format={scale_format}")
    with pytest.raises(UsageError, match="down, up and nearest"):
        parse_scale_rule("pow2-ratio(mode=ceil)")
