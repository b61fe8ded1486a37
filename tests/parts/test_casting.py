"""Exact casts by exponents: every code and shift against torch and ml_dtypes, and tensors whole."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from nybble.core.errors import FormatError, SchemeError
from nybble.formats import get_format
from nybble.ops.casting import largest_shift, shifted_codes
from nybble.qtensor import QuantParams
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer

LIMITS = {
    # 0.5 * 2^-8 is 2^-9, E4M3's smallest number; E5M2's is 2^-16, E4M3FNUZ's 2^-10, E3M4's 2^-6
    ("float4_e2m1fn", "float8_e4m3fn"): 8, ("float4_e2m1fn", "float8_e5m2"): 15,
    ("float4_e2m1fn", "float8_e4m3fnuz"): 9, ("float4_e2m1fn", "float8_e3m4"): 5, ("int4", "float8_e4m3fn"): 9,
    ("float4_e3m0_finite", "float8_e4m3fn"): 7, ("float6_e2m3fn", "float8_e4m3fn"): 6, ("int5", "float8_e5m2"): -1,
    ("float4_e2m1fn", "float6_e2m3fn"): 2,  # 0.5 is subnormal there before any shift
}  # fmt: skip
TORCH = {
    "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "float8_e4m3fnuz": torch.float8_e4m3fnuz,
}  # fmt: skip


@pytest.mark.parametrize(("source", "target"), LIMITS)
def test_every_code_and_shift(source: str, target: str) -> None:
    """Bit patterns are those that ml_dtypes and torch round ``value * 2^-k`` to, and nothing is rounded."""
    narrow, wide, limit = get_format(source), get_format(target), LIMITS[source, target]
    codes = torch.arange(2**narrow.bits).to(torch.uint8)
    if limit < 0:
        with pytest.raises(FormatError, match=f"{target} has not all values of {source}: -15 is none"):
            shifted_codes(codes, torch.tensor(0), narrow, wide)
        return
    assert largest_shift(narrow, wide) == limit
    for k in range(limit + 1):
        exact = narrow.values / 2.0**k
        theirs = exact.astype(np.float32).astype(getattr(ml_dtypes, target))
        assert np.array_equal(theirs.astype(np.float64), exact)
        found = shifted_codes(codes, torch.full((len(codes),), k), narrow, wide)
        assert found.dtype == torch.uint8 and found.tolist() == theirs.view(np.uint8).tolist()
        if target in TORCH:
            assert torch.equal(torch.tensor(exact).float().to(TORCH[target]).view(torch.uint8), found)
    assert not np.isin(narrow.grid / 2.0 ** (limit + 1), wide.grid).all()
    too_far = (codes == 2**narrow.bits - 1).int() * (limit + 1)
    said = rf"{source} times 2\^-k .* 0 <= k <= {limit}; the shifts are 0 .. {limit + 1}"
    with pytest.raises(FormatError, match=said):
        shifted_codes(codes, too_far, narrow, wide)


def test_wide_targets_and_broadcast_shifts() -> None:
    codes = torch.arange(16).to(torch.uint8).expand(3, 16)
    found = shifted_codes(codes, torch.tensor([[0], [30], [120]]), get_format("e2m1"), get_format("bfloat16"))
    wanted = torch.tensor(get_format("e2m1").values).float() * torch.exp2(-torch.tensor([[0.0], [30.0], [120.0]]))
    assert found.dtype == torch.int32 and torch.equal(found.to(torch.int16), wanted.bfloat16().view(torch.int16))


def test_what_has_no_exact_cast() -> None:
    codes, e2m1 = torch.zeros(2, dtype=torch.uint8), get_format("e2m1")
    with pytest.raises(FormatError, match=r"int8 has no exponent to shift; .*float8_e4m3fn"):
        shifted_codes(codes, torch.tensor(0), e2m1, get_format("int8"))
    with pytest.raises(FormatError, match="has not all values of nf4"):
        shifted_codes(codes, torch.tensor(0), get_format("nf4"), get_format("float8_e4m3fn"))
    with pytest.raises(FormatError, match=r"the shifts are 0 .. 12\. Take float8_e5m2, or let fewer scales share"):
        shifted_codes(codes + 1, torch.tensor([0, 12]), e2m1, get_format("float8_e4m3fn"))
    with pytest.raises(FormatError, match=r"the shifts are -1 .. 0\."):
        shifted_codes(codes + 1, torch.tensor([0, -1]), e2m1, get_format("float8_e4m3fn"))
    with pytest.raises(FormatError, match="codes of float8_e4m3fn that mean NaN or Inf"):
        shifted_codes(codes + 0x7F, torch.tensor(0), get_format("float8_e4m3fn"), get_format("bfloat16"))
    assert shifted_codes(codes, torch.tensor([0, 12]), e2m1, get_format("float8_e4m3fn")).tolist() == [0, 0]
    assert shifted_codes(codes[:0], torch.tensor(99), e2m1, get_format("float8_e4m3fn")).shape == (0,)


def weights() -> Tensor:
    """float32 [24, 192], of rows and groups of different sizes; a row and a group of zeros."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 192, generator=generator) * torch.exp2(torch.randn(24, 1, generator=generator))
    x = x * torch.exp2(torch.randn(24, 12, generator=generator).repeat_interleave(16, 1))
    x[3], x[5, 16:32] = 0, 0
    return x


NESTED = "scale_format=(ufloat3_e3m0_finite {} floor=normal)"


@pytest.mark.parametrize(
    ("line", "share"),
    [
        ("fp4-m2 group=16", "channel"), ("e2m1 group=16 scale=pow2-ratio(mode=up)", "channel"),
        ("int4 group=16 scale=pow2-ratio", "channel"), ("e1m2 group=80 pad=true scale=pow2-ratio", "channel"),
        (f"e2m1 group=16 scale=stored {NESTED.format('channel')}", "channel"),
        (f"fp4-m2 group=16 {NESTED.format('group=4')}", "group=64"),
        (f"fp4-m2 block=2x16 {NESTED.format('tensor')}", "tensor"),
        (f"fp4-m2 flat=16 {NESTED.format('flat=12')}", "channel"),
        ("e2m1 shifted", "tensor"), ("e2m1 channel", "channel"), ("e2m1 scale=one", "tensor"),
    ],
)  # fmt: skip
def test_a_tensor_in_a_wider_format(line: str, share: str) -> None:
    found = Quantizer(line).quantize(weights())
    for target in ("float8_e4m3fn", "bfloat16"):
        wide = found.cast(target, share)
        assert wide.format == get_format(target) and str(wide.granularity) == share
        assert torch.equal(wide.dequantize(), found.dequantize())
        rebuilt = BlockQTensor.rebuild(wide.spec(), wide.tensors())
        assert torch.equal(rebuilt.dequantize(), wide.dequantize())
    read = found.cast("float8_e4m3fn", share).unpacked()
    assert (read.view(torch.float8_e4m3fn).float() != 0).any() and len(set(read.flatten().tolist())) > 4


def test_what_a_product_of_fp8_reads() -> None:
    """Codes alone in the product, one real number a row behind it: the layer's output, to float64's rounding."""
    x = torch.randn(7, 192, generator=torch.Generator().manual_seed(1))
    w, inputs = Quantizer("fp4-m2 group=16").quantize(weights()), Quantizer("fp8-token").quantize(x)
    wide = w.cast("float8_e4m3fn")
    assert isinstance(wide.params.scale, Tensor) and isinstance(inputs.params.scale, Tensor)
    left, right = (q.unpacked().view(torch.float8_e4m3fn).double() for q in (inputs, wide))
    product = (left @ right.T) * inputs.params.scale.double() * wide.params.scale.double().T
    wanted = inputs.dequantize().double() @ w.dequantize().double().T  # of 192 terms up to 20, each rounded to float32
    torch.testing.assert_close(product, wanted, rtol=0, atol=192 * 20 * 2.0**-23)
    assert product.abs().mean() > 1


def test_tensors_without_an_exact_cast() -> None:
    x = weights() + 1
    with pytest.raises(SchemeError, match=r"powers of two within each 'channel'; in 2[34] of 24 .*pow2-ratio"):
        Quantizer("e2m1 group=16").quantize(x).cast("float8_e4m3fn")
    with pytest.raises(SchemeError, match="within each 'tensor'"):
        Quantizer("fp4-m2 group=16").quantize(x).cast("float8_e4m3fn", "tensor")
    for words, what in (("symmetric=false", "zero points"), ("scale=minmax(offset=true)", "offsets")):
        with pytest.raises(SchemeError, match=f"{what} have no part in it.*int4"):
            Quantizer(f"int4 group=16 {words}").quantize(x).cast("float8_e4m3fn")
    divided = Quantizer("nvfp4-ct").quantize(x).params.scale
    assert isinstance(divided, BlockQTensor)
    with pytest.raises(SchemeError, match="stored as a divisor"):
        divided.cast("bfloat16", "tensor")
    x[2, 5] = torch.nan
    with pytest.raises(SchemeError, match="scales above 0"):
        Quantizer("fp4-m2 group=16").quantize(x).cast("float8_e4m3fn")
    steep = torch.ones(1, 32)
    steep[0, 16:] /= 2.0**12
    far = Quantizer("e2m1 group=16 scale=pow2(mode=rceil) scale_format=(float8_e8m0fnu scale=one)").quantize(steep)
    with pytest.raises(FormatError, match=r"the shifts are 0 .. 12\. Take float8_e5m2"):
        far.cast("float8_e4m3fn")
    assert torch.equal(far.cast("float8_e5m2").dequantize(), far.dequantize())
    assert torch.equal(far.cast("float8_e4m3fn", "group=16").dequantize(), far.dequantize())  # a second compute group
    grid = torch.linspace(-1, 1, 16)
    learned = Quantizer("e2m1 channel").quantize(x[:2], QuantParams(torch.ones(2, 1), grid=grid))
    with pytest.raises(SchemeError, match="grids have no part"):
        learned.cast("bfloat16")
