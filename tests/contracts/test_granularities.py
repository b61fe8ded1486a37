"""What every granularity must do: blocks are a partition, and the way back is exact."""

from __future__ import annotations

import math

import pytest
import torch

from nybble.core.errors import GranularityError, UsageError
from nybble.granularity import Granularity, PerBlock, Rank1, parse_granularity

SHAPES = [(4, 64), (64,), (2, 3, 64), (6, 192), (1, 1), (5, 7), (3, 0), (0, 64), (2, 0, 4), (1,)]
LINES = [
    *(
        "tensor",
        "channel",
        "token",
        "plane",
        "rank1",
        "group=1",
        "group=16",
        "group=32",
        "group=48 pad=true",
        "group=64 pad=true",
    ),
    *("block=2x32", "block=1x1", "block=3x64", "flat=1", "flat=48", "flat=64", "flat=1000"),
]


def made(line: str) -> Granularity:
    words = {key: value for key, _, value in (word.partition("=") for word in line.split())}
    granularity = parse_granularity(words)
    assert granularity is not None and not words
    return granularity


@pytest.mark.parametrize("line", LINES)
def test_text_leads_back(line: str) -> None:
    assert str(made(line)) == line
    assert made(line) == made(line) and hash(made(line)) == hash(made(line))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("line", LINES)
def test_there_and_back(line: str, shape: tuple[int, ...]) -> None:
    """Each element is in exactly one block, in a slot of its own; what else is in a block is a zero of padding."""
    granularity = made(line)
    try:
        granularity.check(shape)
    except GranularityError:
        with pytest.raises(GranularityError):
            granularity.to_blocks(torch.zeros(shape))
        return
    x = torch.arange(1.0, math.prod(shape) + 1).reshape(shape)
    blocks = granularity.to_blocks(x)
    assert blocks.dim() == 2
    assert blocks.shape[0] == math.prod(granularity.scale_shape(shape))
    assert torch.equal(blocks[blocks > 0].sort().values, x.reshape(-1))
    assert torch.equal(granularity.from_blocks(blocks, shape), x)
    mask = granularity.mask(shape)
    if mask is None:
        assert blocks.numel() == x.numel()
    else:
        assert torch.equal(mask, blocks > 0)
        assert (blocks[~mask] == 0).all()


@pytest.mark.parametrize("shape", [s for s in SHAPES if math.prod(s)], ids=str)
@pytest.mark.parametrize("line", LINES)
def test_expand_gives_each_element_its_own_block(line: str, shape: tuple[int, ...]) -> None:
    granularity = made(line)
    try:
        scale_shape = granularity.scale_shape(shape)
    except GranularityError:
        return
    scale = torch.arange(1.0, math.prod(scale_shape) + 1).reshape(scale_shape)
    expanded = granularity.expand(scale, shape).broadcast_to(shape)
    elements = granularity.to_blocks(torch.zeros(shape)).shape[1]
    want = granularity.from_blocks(scale.reshape(-1, 1).repeat(1, elements), shape)
    assert torch.equal(expanded, want)


@pytest.mark.parametrize("line", LINES)
def test_strides_do_not_matter(line: str) -> None:
    granularity = made(line)
    x = torch.randn(192, 6).t()
    try:
        granularity.check(x.shape)
    except GranularityError:
        return
    assert torch.equal(granularity.to_blocks(x), granularity.to_blocks(x.contiguous()))


@pytest.mark.parametrize(
    ("line", "shape", "numbers"),
    [
        ("group=128", (8, 576), ("576", "128", "64", "96")),
        ("group=32", (4, 33), ("33", "32", "11")),
        ("group=32", (4, 7), ("7", "32", "1, 7")),
        ("block=16x16", (24, 32), ("24 rows", "16x16", "8, 12")),
        ("block=16x16", (32, 40), ("40 columns", "16x16", "8, 10")),
    ],
)
def test_misfits_name_both_numbers_and_sizes_that_fit(
    line: str, shape: tuple[int, ...], numbers: tuple[str, ...]
) -> None:
    with pytest.raises(GranularityError) as caught:
        made(line).check(shape)
    for number in numbers:
        assert number in str(caught.value)


@pytest.mark.parametrize("line", ["channel", "token", "rank1", "group=4"])
def test_too_few_dimensions(line: str) -> None:
    with pytest.raises(GranularityError, match=f"'{line}' needs at least 1"):
        made(line).scale_shape(())
    assert PerBlock(1, 1).scale_shape((2, 2)) == (2, 2)
    with pytest.raises(GranularityError, match="needs at least 2"):
        PerBlock(1, 1).scale_shape((4,))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"group": "0"}, "at least one"),
        ({"flat": "-1"}, "at least one"),
        ({"group": "x"}, "not a size"),
        ({"block": "16"}, "not a size"),
        ({"group": "8", "pad": "maybe"}, "true or false"),
        ({"group": "8", "channel": ""}, "two granularities"),
    ],
)
def test_bad_words(words: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_granularity(words)


def test_documented_scale_shapes() -> None:
    table = {
        "tensor": ((4, 64), (1, 1)),
        "channel": ((4, 64), (4, 1)),
        "token": ((2, 5, 64), (2, 5, 1)),
        "plane": ((4, 3, 8, 8), (4, 3, 1, 1)),
        "group=32": ((4, 64), (4, 2)),
        "block=2x32": ((4, 64), (2, 2)),
        "flat=48": ((4, 64), (6,)),
    }
    for line, (shape, want) in table.items():
        assert made(line).scale_shape(shape) == want
    assert made("plane").scale_shape((4, 64)) == (4, 1)
    assert isinstance(made("rank1"), Rank1)
