"""The gguf package as an oracle: MXFP4 decodes to the OCP values; Q4_0 and Q8_0 are lines of ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nybble.formats import get_format
from nybble.granularity.group import PerGroup
from nybble.packing import get_layout
from nybble.qtensor import QuantParams, dense
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer

quants = pytest.importorskip("gguf.quants", reason="the oracle of GGUF blocks: pip install gguf")
from gguf import GGMLQuantizationType  # noqa: E402


def halves(packed: Tensor) -> Tensor:
    """Low nibbles of 16 bytes are elements 0 .. 15 of a block, high ones 16 .. 31."""
    return torch.cat([packed & 15, packed >> 4], -1)


def mxfp4(data: np.ndarray) -> BlockQTensor:
    """Their 17-byte blocks as a BlockQTensor."""
    blocks = torch.from_numpy(data.copy()).view(-1, 17)
    codes = get_layout("dense").pack(halves(blocks[:, 1:]).reshape(-1), 4)
    count = len(blocks)
    e8m0 = get_format("float8_e8m0fnu")
    scale = BlockQTensor(e8m0, PerGroup(1), (count, 1), blocks[:, 0].contiguous(), QuantParams(None))
    return BlockQTensor(get_format("float4_e2m1fn"), PerGroup(32), (count, 32), codes, QuantParams(scale))


def test_mxfp4_decodes_to_the_ocp_values() -> None:
    """Every exponent but NaN's, every code; theirs stores doubled values and halves the scale."""
    rows = []
    for exponent in range(255):
        codes = np.random.default_rng(exponent).permutation(32).astype(np.uint8) % 16
        rows.append(np.append(np.uint8(exponent), codes[:16] | codes[16:] << 4))
    data = np.stack(rows).astype(np.uint8)
    with np.errstate(over="ignore"):  # 4 and 6 times 2^127
        theirs = quants.dequantize(data.reshape(255, 17), GGMLQuantizationType.MXFP4)
    assert np.array_equal(mxfp4(data).dequantize().numpy(), theirs)


def test_mxfp4_encoder() -> None:
    """Its exponents are the floor rule's; ties go toward zero, and zero has one code."""
    x = torch.randn(200, 32) * torch.exp2(torch.randint(-20, 20, (200, 1)).float())
    x[0] = 0
    x[1] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(4)
    x[2] = -x[1]
    theirs = mxfp4(quants.quantize(x.numpy(), GGMLQuantizationType.MXFP4))
    ours = Quantizer("mxfp4-ocp rounding=toward-zero").quantize(x)
    filled = x.abs().amax(1) > 0  # a zero block has exponent 0 on both sides
    assert torch.equal(dense(ours.params.scale)[filled], dense(theirs.params.scale)[filled])  # type: ignore[arg-type]
    assert torch.equal(dense(ours.params.scale), dense(theirs.params.scale))  # type: ignore[arg-type]
    assert torch.equal(ours.dequantize(), theirs.dequantize())


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        # d = signed extreme / -8, found before it is stored in float16; trunc(x / d + 8.5)
        (
            "Q4_0",
            "int4_full group=32 scale=extreme scale_format=float16 raw_scale=true reciprocal=true rounding=half-up",
        ),
        # d = max|x| / 127, half away from zero
        ("Q8_0", "int8 group=32 scale_format=float16 raw_scale=true reciprocal=true rounding=half-away"),
    ],
)
def test_legacy_blocks(kind: str, line: str) -> None:
    x = torch.randn(400, 32)
    x[0] = 0
    x[1, 3] = 100
    theirs = quants.dequantize(quants.quantize(x.numpy(), GGMLQuantizationType[kind]), GGMLQuantizationType[kind])
    ours = Quantizer(line).fake_quantize(x)
    assert np.array_equal(ours.numpy(), theirs)
