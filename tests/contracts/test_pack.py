"""Codes that need not be the nearest ones: packed, refused, and found again from values."""

from __future__ import annotations

import json

import pytest
import torch
from tests.contracts.inputs import same
from tests.contracts.test_presets import LINES, inputs

from nybble.core.errors import DataError
from nybble.ops.rounding import decode
from nybble.qtensor import QuantParams, dense, from_spec
from nybble.quantizer import Quantizer


@pytest.mark.parametrize("line", LINES)
def test_codes_that_are_not_the_nearest(line: str) -> None:
    """Any codes that the format produces, shuffled over a tensor: packed, kept in the file's form, and decoded."""
    q = Quantizer(line)
    x = inputs(torch.float32)
    params = q.measured(x, None)
    produced = torch.tensor(sorted(q.format.produced))
    codes = produced[torch.randint(len(produced), x.shape)]
    packed = q.pack(codes, params)
    assert torch.equal(packed.unpacked().long(), codes) and packed.shape == x.shape
    want = q.quantize(x, params, torch.Generator().manual_seed(1))
    assert packed.spec() == want.spec()
    for name, value in want.tensors().items():
        assert name == "codes" or same(packed.tensors()[name], value)
    again = from_spec(json.loads(json.dumps(packed.spec())), packed.tensors())
    assert same(again.dequantize(), packed.dequantize())
    # and nothing but the codes decides: those of quantize give what quantize gives
    assert same(q.pack(want.unpacked(), q.soften(params)).dequantize(), want.dequantize())


@pytest.mark.parametrize("line", LINES)
def test_codes_of_values(line: str) -> None:
    """Every value that the format has, -0 too, comes back as its code; the zero point is taken off before."""
    q = Quantizer(line)
    x = inputs(torch.float32)
    params = q.measured(x, None)
    produced = torch.tensor(sorted(q.format.produced))
    codes = produced[torch.randint(len(produced), x.shape)]
    values = decode(codes.to(torch.uint8 if q.format.bits <= 8 else torch.int32), q.format.name)
    if params.zero_point is not None:
        values = values - q.granularity.expand(dense(params.zero_point), x.shape)
    assert torch.equal(q.codes_of(values, params).long(), codes)
    if q.format.bits <= 8:
        with pytest.raises(DataError, match="1 of 12288 values are not on the grid"):
            values[3, 5] += 0.013  # no 8-bit value has a neighbour there
            q.codes_of(values, params)


def test_refused() -> None:
    q = Quantizer("int4 group=32")
    params = q.fit(torch.randn(4, 64))
    codes = torch.zeros(4, 64, dtype=torch.int64)
    for wrong in (16, -1, 300):
        codes[1, 1] = wrong
        with pytest.raises(DataError, match=f"0 to 15.*{wrong}"):
            q.pack(codes, params)
    with pytest.raises(DataError, match=r"float32.*codes_of"):
        q.pack(torch.zeros(4, 64), params)
    with pytest.raises(DataError, match=r"scale.*needs 16 values; found 8"):
        q.pack(torch.zeros(8, 64, dtype=torch.uint8), params)
    with pytest.raises(DataError, match="base3 can't hold code 2"):
        Quantizer("ternary packing=base3").pack(torch.full((5,), 2), QuantParams(torch.ones(1)))
    assert q.pack(torch.zeros(0, 64, dtype=torch.uint8), q.fit(torch.zeros(0, 64))).shape == (0, 64)


def test_sixteen_bits_and_every_code() -> None:
    for line in ("float16_e5m10 tensor", "int8_full tensor", "nf4 tensor"):
        q = Quantizer(line)
        codes = torch.arange(2**q.format.bits, dtype=torch.int32).flip(0)
        packed = q.pack(codes, QuantParams(torch.full((1,), 2.0)))
        assert torch.equal(packed.unpacked().int(), codes)
        finite = torch.tensor(q.format.values[::-1].copy()).float() * 2
        assert same(packed.dequantize(), finite)
