"""Promise 1 for every preset, every format and the lines that combine the parts."""

from __future__ import annotations

import json

import pytest
import torch
from tests.contracts.inputs import same
from torch import Tensor

from nybble.core.errors import SchemeError, UsageError
from nybble.formats import format_names
from nybble.granularity.rank1 import Rank1
from nybble.packing import get_layout
from nybble.presets import PRESETS
from nybble.qtensor import from_spec
from nybble.quantizer import Quantizer
from nybble.rounding import REGISTRY as ROUNDINGS
from nybble.rounding import get_rounding
from nybble.scales import REGISTRY as RULES
from nybble.scales import parse_scale_rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

COMBINED = [
    "int4 group=64 symmetric=false",
    "uint4 group=32 scale=minmax(offset=true) scale_format=float16 offset_format=float16",
    "int4_full group=32 scale=minmax(offset=true) offset_format=(float8_e5m2 flat=16)",
    "int4 group=50 pad=true scale=mse",
    "int3 flat=50 symmetric=false scale=mse(grid=10) rounding=half-away",
    "float4_e2m1fn block=2x32 scale=percentile(p=99)",
    "float4_e2m1fn group=16 scale=pow2 scale_format=float16",
    "float4_e2m1fn group=16 scale=pow2 scale_format=(float8_e4m3fn scale=one)",
    "float4_e2m1fn group=16 scale=mse scale_format=(float8_e4m3fn tensor)",
    "float8_e4m3fn scale=one",
    "ternary scale=mean packing=base3",
    "linear4 rank1",
    "dynamic4 rank1",
    "int4_full group=32 scale=extreme scale_format=float16",
    "float4_e2m1fn group=32 reciprocal=true",
    "float4_e2m1fn group=32 floor=subnormal",
    "float4_e2m1fn group=32 floor=normal center=mean",
    "int8 token rounding=stochastic",
    "int4 group=64 symmetric=false rounding=stochastic",
    "nf4 flat=64 rounding=stochastic scale=mse",
    "int4 channel static",
]
RULE_LINES = [
    f"{'int4_full' if parse_scale_rule(name).needs_integer else 'float4_e2m1fn'} group=32 scale={name}"
    + (" scale_format=(float8_e4m3fn tensor)" if parse_scale_rule(name).two_level else "")
    for name in RULES.names()
]
ROUNDING_LINES = [f"{fmt} group=32 rounding={name}" for name in ROUNDINGS.names() for fmt in ("nf4", "fp4_bnb")]
LINES = [
    *PRESETS,
    *(f"{name} group=32" for name in format_names()),
    *COMBINED,
    *RULE_LINES,
    *ROUNDING_LINES,
]


def inputs(dtype: torch.dtype) -> Tensor:
    """[16, 768]: normal rows, a zero group, one outlier, tiny and large rows, negative zeros."""
    x = torch.randn(16, 768)
    x[0, :128] = 0
    x[1, ::3] = -0.0
    x[2, 7] = 1000
    x[3] *= 1e-6
    x[4] *= 50
    x[5] = x[5].abs()
    return x.to(dtype)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("line", LINES)
def test_fake_quantized_is_packed_and_unpacked_is_reloaded(line: str) -> None:
    q = Quantizer(line)
    for dtype in DTYPES:
        x = inputs(dtype)
        fake = q.fake_quantize(x, generator=generator())
        packed = q.quantize(x, generator=generator())
        assert fake.dtype == dtype and fake.shape == x.shape
        assert same(packed.dequantize(dtype), fake)
        spec = json.loads(json.dumps(packed.spec()))
        stored = {name: tensor.clone() for name, tensor in packed.tensors().items()}
        assert same(from_spec(spec, stored).dequantize(dtype), fake)
        assert set(packed.roles()) == set(stored)
        assert sum(packed.bytes_by_role().values()) == packed.nbytes() == sum(t.nbytes for t in stored.values())
        # Measured first, or on the fly: the same numbers. (A mean to be taken off is no parameter of fit.)
        if not q.center:
            params = q.fit(x)
            assert same(q.fake_quantize(x, params, generator()), fake)
            assert same(q.quantize(x, params, generator()).dequantize(dtype), fake)


@pytest.mark.parametrize("line", LINES)
def test_line_leads_back(line: str) -> None:
    q = Quantizer(line)
    assert Quantizer(str(q)) == q and hash(Quantizer(str(q))) == hash(q)
    assert str(Quantizer(str(q))) == str(q)
    assert q.replace() == q


@pytest.mark.parametrize(
    ("line", "written"),
    [
        ("int4_full group=64 scale=minmax", "int4 group=64 symmetric=false"),
        ("int8-ct-asym", "int8 channel symmetric=false rounding=nearest-even-code"),
        ("int4 symmetric=false scale=mse(grid=80)", "int4 symmetric=false scale=mse(grid=80)"),
        ("int8_full token scale=mse(asymmetric=true)", "int8 token symmetric=false scale=mse"),
        ("uint4 channel scale=minmax", "uint4 channel symmetric=false"),
        ("int1_full scale=minmax", "int1_full symmetric=false"),  # there is no int1
        ("int4_full scale=minmax(offset=true)", "int4_full scale=minmax(offset=true)"),
        ("int4_full group=32", "int4_full group=32"),
        ("int4 group=32 scale_format=(int8_full scale=minmax)", "int4 group=32 scale_format=(int8 symmetric=false)"),
    ],
)
def test_integers_with_a_zero_point_are_written_as_people_write_them(line: str, written: str) -> None:
    assert str(Quantizer(line)) == written and Quantizer(written) == Quantizer(line)


@pytest.mark.parametrize("line", LINES)
def test_codes_are_what_the_format_produces(line: str) -> None:
    q = Quantizer(line)
    codes = q.quantize(inputs(torch.float32), generator=generator()).unpacked()
    assert set(codes.flatten().tolist()) <= q.format.produced


@pytest.mark.parametrize("line", LINES)
def test_input_stays_untouched_and_strides_do_not_matter(line: str) -> None:
    q = Quantizer(line)
    x = inputs(torch.float32)
    before = x.clone()
    fake = q.fake_quantize(x, generator=generator())
    strided = x.t().contiguous().t()
    assert not strided.is_contiguous()
    assert same(q.fake_quantize(strided, generator=generator()), fake)
    assert same(q.quantize(strided, generator=generator()).dequantize(), fake)
    assert same(x, before)
    fake.zero_()  # and what comes out is not a view of what went in
    assert same(x, before)


@pytest.mark.parametrize("line", LINES)
def test_grid_values_stay(line: str) -> None:
    """Quantizing with the parameters of what came out changes nothing: rounding is idempotent."""
    q = Quantizer(line)
    if q.floor or q.center or q.raw_scale:  # each moves what is stored away from what was divided by
        return
    x = inputs(torch.float32)
    params = q.fit(x)
    once = q.fake_quantize(x, params, generator())
    twice = q.fake_quantize(once, params, generator())
    if get_rounding(q.rounding).stochastic or q.reciprocal or params.offset is not None:
        # the quotient is off the grid by a rounding error, which a tie rule forgives and a draw or threshold may not
        assert torch.allclose(once, twice, rtol=0.3, atol=1e-3)
    else:
        assert same(once, twice)


@pytest.mark.parametrize("line", [line for line in LINES if "block=" not in line])
def test_empty(line: str) -> None:
    q = Quantizer(line)
    for shape in ((0, 768), (3, 0)):
        x = torch.zeros(shape)
        assert q.fake_quantize(x).shape == shape
        packed = q.quantize(x)
        assert packed.dequantize().shape == shape
        assert from_spec(packed.spec(), packed.tensors()).dequantize().shape == shape


@pytest.mark.parametrize("line", [line for line in LINES if Quantizer(line).scale.two_level is False])
def test_one_block_and_many(line: str) -> None:
    """More than one second-level block, so that nested granularities have to count."""
    q = Quantizer(line)
    x = torch.randn(128, 768)
    packed = q.quantize(x, generator=generator())
    again = from_spec(json.loads(json.dumps(packed.spec())), packed.tensors())
    assert same(again.dequantize(), q.fake_quantize(x, generator=generator()))


def test_rank1_takes_the_smaller_maximum() -> None:
    q = Quantizer("linear4 rank1")
    x = torch.rand(6, 8) + 0.1
    want = torch.minimum(x.amax(1, keepdim=True), x.amax(0, keepdim=True))
    factored = q.fit(x).scale
    assert factored is not None and isinstance(q.granularity, Rank1)
    out = q.fake_quantize(x)
    assert (out / want).mul(16).sub((out / want).mul(16).round()).abs().max() < 1e-5


@pytest.mark.parametrize("fmt", ["uint2", "int2_full", "float3_e1m1_finite", "int4", "dynamic2", "linear2"])
def test_base3_holds_ternary_codes_only(fmt: str) -> None:
    with pytest.raises((SchemeError, UsageError), match="base3"):
        Quantizer(f"{fmt} packing=base3")


def test_base3_takes_what_it_holds() -> None:
    holds = get_layout("base3").holds
    assert holds is not None and set(holds) == {0, 1, 3}
    for fmt in ("ternary", "int2"):
        q = Quantizer(f"{fmt} packing=base3")
        x = torch.randn(7, 13)
        packed = q.quantize(x)
        assert packed.codes.numel() == -(-7 * 13 // 5)
        assert same(packed.dequantize(), q.fake_quantize(x))
