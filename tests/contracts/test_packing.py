"""What every packing layout must do: all codes back, in the bytes it promises."""

from __future__ import annotations

import pytest
import torch

from nybble.core.errors import FormatError
from nybble.packing import REGISTRY, get_layout

LENGTHS = (0, 1, 2, 3, 5, 7, 8, 9, 31, 32, 33, 255, 1001)


def legal(layout: str, bits: int) -> torch.Tensor | None:
    """The codes that a layout holds at this width, None if it takes no such width."""
    part = get_layout(layout)
    try:
        part.size(1, bits)
    except FormatError:
        return None
    return torch.tensor(sorted(range(2**bits) if part.holds is None else part.holds))


@pytest.mark.parametrize("bits", [*range(1, 9), 12, 16])
@pytest.mark.parametrize("name", REGISTRY.names())
def test_there_and_back(name: str, bits: int) -> None:
    codes = legal(name, bits)
    layout = get_layout(name)
    if codes is None:
        with pytest.raises(FormatError, match=f"packing={name}"):
            layout.pack(torch.zeros(1, dtype=torch.uint8), bits)
        return
    dtype = torch.uint8 if bits <= 8 else torch.int32
    generator = torch.Generator().manual_seed(bits)
    for length in LENGTHS:
        x = codes[torch.randint(len(codes), (length,), generator=generator)].to(dtype)
        packed = layout.pack(x, bits)
        assert packed.dtype == torch.uint8 and packed.shape == (layout.size(length, bits),)
        assert packed.is_contiguous() and packed.untyped_storage().nbytes() == packed.numel(), "hidden bytes"
        again = layout.unpack(packed, bits, length)
        assert again.dtype == dtype and torch.equal(again, x)


@pytest.mark.parametrize("bits", range(1, 9))
def test_dense_is_a_little_endian_stream_of_bits(bits: int) -> None:
    """Bit for bit against Python's own integers; no bit is lost but in the last byte."""
    codes = torch.randint(2**bits, (101,), dtype=torch.uint8)
    stream = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    size = -(-101 * bits // 8)
    assert bytes(get_layout("dense").pack(codes, bits).tolist()) == stream.to_bytes(size, "little")


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_dense_across_its_chunks(bits: int) -> None:
    count = (1 << 18) * 2 + 13
    codes = torch.randint(2**bits, (count,), dtype=torch.uint8)
    layout = get_layout("dense")
    packed = layout.pack(codes, bits)
    assert torch.equal(layout.unpack(packed, bits, count), codes)
    assert torch.equal(packed[: 1000 * bits], layout.pack(codes[:8000], bits))


def test_wide_codes_at_an_odd_address() -> None:
    codes = torch.tensor([0, 1, 0x7FFF, 0x8000, 0xFFFF], dtype=torch.int32)
    packed = get_layout("dense").pack(codes, 16)
    odd = torch.zeros(11, dtype=torch.uint8)
    odd[1:] = packed
    assert torch.equal(get_layout("dense").unpack(odd[1:], 16, 5), codes)
    assert packed.tolist()[:4] == [0, 0, 1, 0]


def test_base3_bytes() -> None:
    """byte = sum of digit * 3**i, -1 as 2."""
    packed = get_layout("base3").pack(torch.tensor([1, 3, 0, 0, 3, 1], dtype=torch.uint8), 2)
    assert packed.tolist() == [1 + 2 * 3 + 2 * 81, 1]


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_description_is_packed_without_calculating(bits: int) -> None:
    """On the meta device: as long as the real ones, in one step however long they are."""
    dense, count = get_layout("dense"), (1 << 20) + 8
    kept = dense.pack(torch.empty(count, dtype=torch.uint8, device="meta"), bits)
    assert kept.is_meta and (kept.dtype, kept.numel()) == (torch.uint8, dense.size(count, bits))
    again = dense.unpack(kept, bits, count)
    assert again.is_meta and (again.dtype, again.numel()) == (torch.uint8, count)
