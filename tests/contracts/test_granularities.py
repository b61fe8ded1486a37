"""What every granularity must do: blocks are a partition, and the way back is exact."""

from __future__ import annotations

import math

import pytest
import torch

from nybble.core.errors import GranularityError, SchemeError, UsageError
from nybble.formats import get_format
from nybble.granularity import REGISTRY, Granularity, get_granularity, make_granularity, parse_granularity
from nybble.granularity.block import PerBlock
from nybble.granularity.rank1 import Rank1
from nybble.quantizer import Quantizer

PARTS: dict[str, type[Granularity]] = REGISTRY.all()
SHAPES = [(4, 64), (64,), (2, 3, 64), (6, 192), (1, 1), (5, 7), (3, 0), (0, 64), (2, 0, 4), (1,)]
LINES = [
    *(part.example for part in PARTS.values()),
    *("group=1", "group=32", "group=48 pad=true", "group=64 pad=true", "shifted=3"),
    *("block=2x32", "block=1x1", "block=3x64", "flat=1", "flat=48", "flat=64", "flat=1000"),
]
made = make_granularity


@pytest.mark.parametrize("word", PARTS)
def test_a_part_says_what_it_is(word: str) -> None:
    part = PARTS[word]
    assert part.word == word and part.example.split("=")[0] == word
    example = made(part.example)
    assert type(example) is part
    example.check((8, 32))
    assert part.calibrated_on in ("", "values", "columns") and part.combine in ("", "product", "min")
    assert bool(part.factors_are) == example.factored
    assert example.factored or not part.stored
    assert not part.one_scale or example.scale_shape((8, 32)) == (1, 1)
    if part.calibrated_on:  # one value for tensors of every shape, or one a column
        assert math.prod(example.scale_shape((8, 32))) == 1


@pytest.mark.parametrize("word", [word for word, part in PARTS.items() if part.rows_apart])
def test_rows_apart_means_that_no_block_crosses_rows(word: str) -> None:
    rows = made(PARTS[word].example).to_blocks(torch.arange(8.0)[:, None].expand(8, 32))
    assert torch.equal(rows.amin(1), rows.amax(1))


@pytest.mark.parametrize("word", [word for word, part in PARTS.items() if part.for_convolutions])
def test_scales_of_convolutions_cover_whole_channels(word: str) -> None:
    granularity, shape = made(PARTS[word].example), (2, 3, 4, 8)
    scales = torch.arange(float(math.prod(granularity.scale_shape(shape)))).reshape(granularity.scale_shape(shape))
    wide = granularity.expand(scales, shape).expand(shape)
    assert torch.equal(wide, wide[:, :, :1, :1].expand(shape))


@pytest.mark.parametrize("word", [word for word, part in PARTS.items() if made(part.example).factored])
def test_factors_make_the_scale(word: str) -> None:
    """They broadcast, follow from the summary alone, and take each element within the format's range."""
    granularity, fmt = made(PARTS[word].example), get_format("float4_e2m1fn")
    x = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 9, 32)
    factors = granularity.fit_factors(x, fmt)
    scale = torch.ones(x.shape)
    for number, factor in enumerate(factors):
        assert factor.dim() == x.dim() and factor.dtype == torch.float32
        wide = factor.expand(x.shape)
        scale = wide if not number else scale * wide if granularity.combine == "product" else torch.minimum(scale, wide)
    assert float((x / scale).abs().max()) <= fmt.absmax * 2**0.5 * (1 + 1e-6)  # shifts round to the nearest power
    again = granularity.fit_factors(granularity.summary(x), fmt)
    assert all(torch.equal(a.reshape(-1), b.reshape(-1)) for a, b in zip(factors, again, strict=True))
    for line, text in (
        *((line, f"are {granularity.factors_are} \\(scale=absmax\\)") for line in ("scale=mse", "symmetric=false")),
        ("scale=absmax(target=3)", "has none"),
        *((line, "stay in float32") for line in ("scale_format=float16", "raw_scale=true")),
    ):
        with pytest.raises(SchemeError, match=f"{word} factors {text}" if "stay" in text else text):
            Quantizer(f"int4 {granularity} {line}")


@pytest.mark.parametrize("word", [word for word, part in PARTS.items() if part.stored])
def test_stored_factors_come_back(word: str) -> None:
    granularity = made(PARTS[word].example)
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 32, 2.0)
    factors = granularity.fit_factors(granularity.summary(x), get_format("float4_e2m1fn"))
    parts = granularity.store(factors)
    assert parts.keys() == {"scale", *granularity.stored}
    assert parts["scale"].shape == (1,)
    for name, dtype in granularity.stored.items():
        assert parts[name].shape == (32,) and parts[name].dtype == getattr(torch, dtype)
        assert len(torch.unique(parts[name])) > 1
    assert all(torch.equal(a, b) for a, b in zip(granularity.restore(parts), factors, strict=True))


@pytest.mark.parametrize("word", PARTS)
def test_what_a_part_has_not_is_refused(word: str) -> None:
    granularity = made(PARTS[word].example)
    if not granularity.factored:
        with pytest.raises(GranularityError, match="one scale a block"):
            granularity.fit_factors(torch.ones(8, 32), get_format("int4"))
    if not granularity.stored:
        for refused in (granularity.store, granularity.restore):
            with pytest.raises(GranularityError, match="no calibrated factors"):
                refused({})  # type: ignore[arg-type]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) == 2], ids=str)
def test_the_plainest_spelling_cuts_the_same_blocks(line: str, shape: tuple[int, ...]) -> None:
    granularity = made(line)
    try:
        granularity.check(shape)
    except GranularityError:
        return
    plain, padded = granularity.fitted(shape), granularity.mask(shape)
    assert plain.scale_shape(shape) == granularity.scale_shape(shape)
    owners = []
    for part in (granularity, plain):
        blocks = part.to_blocks(torch.zeros(shape))
        owners.append(part.from_blocks(torch.arange(float(len(blocks)))[:, None].expand(blocks.shape), shape))
    assert torch.equal(*owners)
    lengths = {1} if padded is None else set(padded.sum(1).tolist())
    assert not math.prod(shape) or granularity.uneven(shape) == plain.uneven(shape) == (len(lengths) > 1)
    assert granularity.uneven(shape) or not math.prod(shape) or "pad" not in str(plain)


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
    if not granularity.factored:
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
    blocks = granularity.to_blocks(torch.zeros(shape))
    want = granularity.from_blocks((scale.reshape(-1, 1) + blocks).clone(), shape)
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
        ({"channel": "7"}, "'channel' takes no value; got channel=7"),
        ({"block": "4x4x4"}, "not a size"),
        ({"block": "0x16"}, "at least one"),
        ({"flat": ""}, "not a size"),
        ({"shifted": "x"}, "not a size"),
        ({"shifted": "6"}, "1 to 5 bits"),
    ],
)
def test_bad_words(words: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_granularity(words)


@pytest.mark.parametrize("text", ["", "scale=mse", "channel static", "channel pad=true", "columns=3"])
def test_a_spelling_has_nothing_else(text: str) -> None:
    with pytest.raises(UsageError, match="unknown granularity"):
        make_granularity(text)


def test_words_of_a_quantizer_line() -> None:
    """A new granularity takes the place of the old one and of what went with it, in any order of the words."""
    assert str(Quantizer("int4 pad=true group=48")) == "int4 group=48 pad=true"
    assert str(Quantizer("int4 group=48 pad")) == "int4 group=48 pad=true"
    assert str(Quantizer("int4", pad=True, group=48)) == "int4 group=48 pad=true"
    padded = Quantizer("int4 group=48 pad=true")
    assert str(padded.replace(group=64)) == "int4 group=64"
    assert str(padded.replace(pad=False)) == "int4 group=48"
    assert str(padded.replace(channel=True)) == "int4 channel"
    assert str(padded.replace(tensor=True)) == str(Quantizer("int4 tensor")) == "int4"
    assert str(Quantizer("mxfp4 channel").granularity) == "channel"
    for line, text in (
        ("int4 group=32 channel", "two granularities in one line: group, channel"),
        ("int4 channel pad=true", "'pad' doesn't go with 'channel'"),
        ("int4 grup=32", "Did you mean 'group'"),
    ):
        with pytest.raises(UsageError, match=text):
            Quantizer(line)


def test_a_word_is_the_key() -> None:
    assert get_granularity("rank1") is Rank1
    with pytest.raises(UsageError, match=r"unknown granularity 'rank_2'\. Did you mean 'rank1'"):
        get_granularity("rank_2")


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
    assert [f.shape for f in made("rank1").fit_factors(torch.ones(4, 64), get_format("int4"))] == [(4, 1), (1, 64)]
    assert [f.shape for f in made("shifted").fit_factors(torch.ones(4, 64), get_format("int4"))] == [(1, 1), (1, 64)]
    assert isinstance(made("rank1"), Rank1)
