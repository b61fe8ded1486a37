"""Independent oracles: ml_dtypes' and torch's own small types, every code and every float16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.contracts.inputs import all_float16, random_bits
from torch import Tensor

from nybble.formats import get_format
from nybble.ops.rounding import decode, encode, round_to

ml_dtypes = pytest.importorskip("ml_dtypes", reason="the oracle of small floating-point types: pip install ml_dtypes")

FLOATS = [
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3", "float8_e3m4"),
    *("float8_e4m3b11fnuz", "float6_e3m2fn", "float6_e2m3fn", "float4_e2m1fn"),
]
INTEGERS = {
    "int4": "int4_full",
    "uint4": "uint4",
    "int2": "int2_full",
    "uint2": "uint2",
    "int1": "int1_full",
    "uint1": "uint1",
}
TORCH = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]


def dtype(name: str) -> np.dtype[np.generic]:
    kind: np.dtype[np.generic] = np.dtype(getattr(ml_dtypes, name))
    return kind


def clamped(name: str) -> Tensor:
    """Inputs inside the finite range, where saturation and overflow to Inf or NaN do not differ."""
    fmt = get_format(name)
    x = torch.cat([all_float16(), random_bits(20_000)])
    return x[~x.isnan()].clamp(fmt.min, fmt.max)


def test_every_small_float_of_ml_dtypes_is_here() -> None:
    names = {n for n in dir(ml_dtypes) if n.startswith("float") and n != "finfo"}
    assert names == {*FLOATS, "float8_e8m0fnu"}


@pytest.mark.parametrize("name", FLOATS)
def test_floats(name: str) -> None:
    fmt = get_format(name)
    codes = np.arange(2**fmt.bits, dtype=np.uint8)
    theirs = codes.view(dtype(name)).astype(np.float64)
    assert np.array_equal(fmt.values, theirs, equal_nan=True)
    assert np.array_equal(np.signbit(fmt.values)[~np.isnan(theirs)], np.signbit(theirs)[~np.isnan(theirs)])
    info = ml_dtypes.finfo(dtype(name))
    assert fmt.max == float(info.max) and fmt.min == float(info.min) and fmt.bits == info.bits
    assert fmt.min_normal == float(info.smallest_normal) and fmt.smallest == float(info.smallest_subnormal)
    x = clamped(name)
    want = x.numpy().astype(dtype(name))
    assert np.array_equal(encode(x, name, "nearest-even").numpy(), want.view(np.uint8))
    assert np.array_equal(round_to(x, name, "nearest-even").numpy(), want.astype(np.float32))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e4m3"])
def test_nan_codes_are_nan_there_too(name: str) -> None:
    code = encode(torch.tensor([torch.nan]), name, "nearest-even").numpy()
    assert np.isnan(code.view(dtype(name)).astype(np.float32)).all()


@pytest.mark.parametrize(("theirs", "ours"), INTEGERS.items())
def test_integers(theirs: str, ours: str) -> None:
    fmt = get_format(ours)
    values = np.arange(fmt.min, fmt.max + 1)
    bits = values.astype(dtype(theirs)).view(np.uint8) & (2**fmt.bits - 1)
    assert np.array_equal(bits, encode(torch.from_numpy(values).float(), ours, "nearest-even").numpy())
    info = ml_dtypes.iinfo(dtype(theirs))
    assert (fmt.min, fmt.max) == (info.min, info.max)


def test_e8m0() -> None:
    """Casts to it differ among libraries (section 3): powers of two alone are compared, and the codes."""
    fmt = get_format("float8_e8m0fnu")
    codes = np.arange(256, dtype=np.uint8)
    assert np.array_equal(fmt.values, codes.view(dtype("float8_e8m0fnu")).astype(np.float64), equal_nan=True)
    powers = torch.from_numpy(np.ldexp(np.float32(1), np.arange(-127, 128)).astype(np.float32))
    assert encode(powers, fmt.name, "nearest-even").tolist() == list(range(255))
    assert encode(torch.tensor([torch.nan]), fmt.name, "nearest-even").item() == 255


@pytest.mark.parametrize("name", TORCH)
def test_torch(name: str) -> None:
    kind: torch.dtype = getattr(torch, name)
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(decode(codes, name).nan_to_num(9e9), codes.view(kind).float().nan_to_num(9e9))
    x = clamped(name)
    x = x[x != 0] if name.endswith("fnuz") else x  # torch 2.11 keeps a sign that fnuz has no code for
    assert torch.equal(encode(x, name, "nearest-even"), x.to(kind).view(torch.uint8))


def test_torch_e8m0() -> None:
    codes = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(decode(codes, "float8_e8m0fnu"), codes.view(torch.float8_e8m0fnu).float())


@pytest.mark.parametrize(("name", "kind"), [("float16_e5m10", torch.float16), ("float16_e8m7", torch.bfloat16)])
def test_sixteen_bits(name: str, kind: torch.dtype) -> None:
    x = clamped(name)
    want = x.to(kind)
    assert torch.equal(encode(x, name, "nearest-even").to(torch.int16), want.view(torch.int16))
    codes = torch.arange(65536, dtype=torch.int32)
    assert torch.equal(decode(codes, name).nan_to_num(9e9), codes.to(torch.int16).view(kind).float().nan_to_num(9e9))
