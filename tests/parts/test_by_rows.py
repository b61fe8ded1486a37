"""Dequantizing by rows gives the bits of the plain way, whatever the format, the sharing and the dtype."""

from __future__ import annotations

import pytest
import torch

from nybble.kernels._places import blocks_of
from nybble.nn.packed import Packed
from nybble.qtensor._by_rows import by_rows
from nybble.quantizer import Quantizer


@pytest.mark.parametrize(
    "line",
    [
        "int4 group=32", "int4 group=64 symmetric=false", "nvfp4", "nvfp4-ct", "mxfp4", "nf4 group=64", "q4_k", "q8_0",
        "float8_e4m3fn channel", "float8_e4m3fn tensor", "int8 channel symmetric=false", "mxfp8", "int4 tensor",
    ],
)  # fmt: skip
def test_the_same_bits(line: str) -> None:
    weight = torch.randn(520, 512, generator=torch.Generator().manual_seed(0))
    tensor = Quantizer(line).quantize(weight)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        quick = by_rows(tensor, dtype)
        assert quick is not None and quick.dtype == dtype
        assert torch.equal(quick, tensor._dequantized(dtype))


def test_what_it_leaves_to_the_plain_way() -> None:
    weight = torch.randn(520, 512, generator=torch.Generator().manual_seed(0))
    for line in ("int3 group=32", "int4 block=8x8", "nf4 flat=64", "float4_e2m1fn rank1", "int4 group=33 pad=true"):
        assert by_rows(Quantizer(line).quantize(weight), torch.float32) is None, line
    assert by_rows(Quantizer("int4 group=32").quantize(weight[:8]), torch.float32) is None
    assert by_rows(Quantizer("int4 group=32").quantize(weight).to("meta"), torch.float32) is None


@pytest.mark.parametrize(
    "line", ["int4 group=33 pad=true", "int8 group=33 pad=true symmetric=false", "nf4 group=33 pad=true"]
)
def test_a_short_last_group_of_as_many_as_would_divide(line: str) -> None:
    """512 columns in 16 groups of 33, the last of 17: not in 16 of 32. What is stored, and what is multiplied with."""
    weight = torch.randn(520, 512, generator=torch.Generator().manual_seed(0))
    quantizer = Quantizer(line)
    stored = quantizer.quantize(weight)
    assert torch.equal(stored.dequantize(), quantizer.fake_quantize(weight))
    assert blocks_of(str(stored.granularity), 520, 512) == (33, 16, 1)
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    found = Packed(stored, torch.float32).linear(x, None)
    torch.testing.assert_close(found, x @ quantizer.fake_quantize(weight).T, rtol=1e-4, atol=1e-4)
