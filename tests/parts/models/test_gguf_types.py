"""GGUF's block types: bytes to QTensors and back, against the gguf package and ggml itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from tests.parts.models import ggml

from nybble.core.errors import FileError, SchemeError, UsageError
from nybble.models.gguf.qtensors import exact_type, fitted, global_scale, with_global_scale
from nybble.models.gguf.types import (
    REGISTRY,
    BlockType,
    block_type,
    by_number,
    decode,
    encode,
    type_name,
    writable,
    writable_types,
)
from nybble.presets import PRESETS
from nybble.qtensor import from_spec
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer

NAMES = REGISTRY.names()
WRITTEN = list(writable_types())
ROWS = 6


def kind_of(name: str) -> BlockType:
    found: BlockType = REGISTRY.get(name)
    return found


def columns(kind: BlockType) -> int:
    return 512 if kind.block == 256 else 4 * kind.block


def blocks_of(name: str, kind: BlockType) -> np.ndarray[Any, Any]:
    """Random bytes, as far as all bytes mean something: [blocks, bytes]."""
    count = ROWS * columns(kind) // kind.block
    data = np.random.default_rng(kind.number).integers(0, 256, (count, kind.nbytes), dtype=np.uint8)
    if name == "mxfp4":
        data[:, 0] %= 255  # 255 is NaN by OCP, 2^128 in ggml
    if name == "nvfp4":
        data[:, :4] &= 0x7F
        data[:, :4][data[:, :4] == 0x7F] = 0x7E  # read as 0, and written so
    if name == "tq1-0":  # 243 of 256 bytes are written
        data = Quantizer("tq1_0").quantize(torch.randn(count, 256)).unpacked().numpy()
        data = writable(block_type("TQ1_0")).write(
            {"codes": data, "d": np.tile(np.array([0, 60], np.uint8), (count, 1))}
        )
    return data


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_dequantizers(name: str) -> None:
    kind = kind_of(name)
    data, shape = blocks_of(name, kind), (ROWS, columns(kind))
    ours = decode(kind, data, shape).dequantize().numpy()
    known = {int(number): number for number in GGML_QUANT_SIZES}
    if kind.number in known and hasattr(__import__("gguf.quants").quants, type_name(kind)):
        assert GGML_QUANT_SIZES[known[kind.number]] == (kind.block, kind.nbytes)
        with np.errstate(all="ignore"):
            theirs = dequantize(data.reshape(ROWS, -1), GGMLQuantizationType(kind.number))
        assert np.array_equal(ours, theirs, equal_nan=True)
    elif not ggml.found():
        pytest.skip("the gguf package has no such dequantizer; libggml-python has")
    if ggml.found():
        traits = ggml.traits(kind.number)
        assert (traits.block, traits.nbytes) == (kind.block, kind.nbytes)
        assert np.array_equal(ours.reshape(-1), ggml.to_float(kind.number, data), equal_nan=True)


@pytest.mark.parametrize("name", WRITTEN)
def test_there_and_back(name: str) -> None:
    kind = kind_of(name)
    data, shape = blocks_of(name, kind), (2, ROWS // 2, columns(kind))
    found = decode(kind, data, shape)
    assert encode(kind, found).numpy().tobytes() == data.tobytes() and encode(kind, found).shape[:2] == shape[:2]
    assert exact_type(found) == kind and fitted(kind, found).dequantize().shape == shape
    again = from_spec(found.spec(), found.tensors())
    assert isinstance(again, BlockQTensor) and encode(kind, again).numpy().tobytes() == data.tobytes()
    least = 8 * kind.nbytes / kind.block
    assert found.bits_per_element() <= least + (1 / 16 if name == "nvfp4" else 0)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_preset_makes_is_written(name: str) -> None:
    """As a type's preset quantizes, so the file says, and ggml reads it."""
    kind = kind_of(name)
    assert kind.line in PRESETS
    x = torch.randn(ROWS, columns(kind)) * 0.02
    found = kind.quantizer.quantize(x)
    scale = global_scale(found)
    data = encode(kind, found)
    back = decode(kind, data.numpy(), (ROWS, columns(kind)))
    if scale is not None:
        back = with_global_scale(back, scale)
    assert torch.equal(back.dequantize(), found.dequantize())
    assert float((found.dequantize() - x).square().sum() / x.square().sum()) < 0.4


def test_several_chunks_are_one() -> None:
    kind = block_type("q5_k")
    x = torch.randn(1200, 512)
    found = Quantizer("uint5 group=32 scale=minmax(offset=true) offset_format=float16").quantize(x)
    data = np.random.default_rng(0).integers(0, 256, (2400, kind.nbytes), dtype=np.uint8)
    data[:, 3] &= 0x3B  # finite
    data[:, 1] &= 0x3B
    whole = decode(kind, data, (1200, 512))
    assert torch.equal(whole.dequantize()[1100:], decode(kind, data[2200:], (100, 512)).dequantize())
    assert encode(kind, whole).numpy().tobytes() == data.tobytes()
    assert exact_type(found) is block_type("q5_1")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("int4 group=32", "q4-0"),
        ("int4 group=64", "q4-0"),
        ("int4_full group=128 scale=extreme", "q4-0"),
        ("int8 channel scale_format=float16", "q8-0"),
        ("int5 tensor scale_format=float16", "q5-0"),
        ("uint4 group=64 scale=minmax(offset=true)", "q4-1"),
        ("ternary group=256 scale=mean", "tq1-0"),
        ("ternary channel scale=mean scale_format=float16", "tq1-0"),
        ("binary channel scale=mean scale_format=float16", "q1-0"),
        ("mxfp4-ct", "mxfp4"),
        ("nvfp4-ct", "nvfp4"),
    ],
)
def test_lines_that_a_type_holds(line: str, wanted: str) -> None:
    """Fewer codes, wider groups, another owner's rule: the same values under the type's own line."""
    x = torch.randn(4, 512)
    weight = Quantizer(line).quantize(x)
    described = Quantizer(line).quantize(x.to("meta"))
    kind = kind_of(wanted)
    assert exact_type(weight) == exact_type(described) == kind
    made = fitted(kind, weight)
    back = decode(kind, encode(kind, made).numpy(), (4, 512))
    scale = global_scale(made)
    if scale is None:
        assert torch.equal(back.dequantize(), weight.dequantize())
    else:  # a stored divisor becomes a factor
        torch.testing.assert_close(with_global_scale(back, scale).dequantize(), weight.dequantize(), rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    "line", ["int4 group=64 symmetric=false", "nf4 flat=64", "float4_e2m1fn group=32", "int4 group=16", "int4 group=48"]
)
def test_lines_that_none_holds(line: str) -> None:
    weight = Quantizer(line).quantize(torch.randn(4, 384))
    assert exact_type(weight) is None
    with pytest.raises(SchemeError, match=r"Q4_0 holds 'q4_0'; got '[a-z0-9_]+ (group|flat)="):
        fitted(block_type("q4_0"), weight)


def test_what_is_refused() -> None:
    kind = block_type("Q4_K")
    with pytest.raises(UsageError, match=r"unknown GGUF block type 'q4-x'\. Did you mean"):
        block_type("q4_x")
    with pytest.raises(FileError, match=r"rows of Q4_K are blocks of 256; a tensor \[2, 128\]"):
        decode(kind, np.zeros(144, np.uint8), (2, 128))
    with pytest.raises(FileError, match=r"a Q4_K tensor \[2, 256\] takes 288 bytes; there are 144"):
        decode(kind, np.zeros(144, np.uint8), (2, 256))
    with pytest.raises(FileError, match="a scale of NVFP4 has no sign; found the byte 0x80"):
        decode(block_type("nvfp4"), np.full(36, 0x80, np.uint8), (1, 64))
    with pytest.raises(SchemeError, match="Q4_K holds 'q4_k'; got 'int8_full group=32 scale=float16'"):
        encode(kind, Quantizer("q8_0").quantize(torch.randn(1, 256)))
    book = block_type("iq2_xs")
    with pytest.raises(UsageError, match="IQ2_XS is read but not written"):
        encode(book, decode(book, np.zeros(74, np.uint8), (1, 256)))
    wide = Quantizer("int8 group=32 scale_format=float32").quantize(torch.randn(1, 256))
    with pytest.raises(SchemeError, match=r"Q8_0 keeps scales in float16.*scale_format=float16"):
        fitted(block_type("q8_0"), wide)


def test_numbers_are_ggmls() -> None:
    assert len(by_number()) == len(NAMES)
    for number in GGMLQuantizationType:
        if number.name.replace("_", "-").lower() in NAMES:
            assert by_number()[int(number)] is block_type(number.name)
