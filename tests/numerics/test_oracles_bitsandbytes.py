"""bitsandbytes as an oracle: tables, 4-bit codes, and 8-bit ones where it finds the nearest.

The presets without ``-cpu`` follow the CUDA kernels. Where no GPU is at hand, they are held to those kernels'
comparisons, written out below from the constants of the method sheet; the presets with ``-cpu`` are held to the package
itself.
"""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from nybble.formats import get_format
from nybble.ops.rounding import decode, encode
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer

with warnings.catch_warnings():  # what it looks for at import is none of ours
    warnings.simplefilter("ignore")
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="the oracle of NF4, FP4 and dynamic maps: pip install bitsandbytes"
    )


def nibbles(packed: Tensor) -> Tensor:
    """Their bytes as codes: the first element is in the HIGH nibble (ours: low)."""
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 15], 1).flatten()


def data(blocks: int, size: int = 64) -> Tensor:
    """Normal blocks, and blocks whose quotients fall on and beside each threshold of NF4 and FP4."""
    x = torch.randn(blocks, size)
    points = []
    for name in ("nf4", "fp4_bnb"):
        grid = get_format(name).grid.astype(np.float32)
        own = get_format(name).encoder_thresholds
        assert own is not None
        middles = [(grid[1:] + grid[:-1]) / np.float32(2), own]
        for m in middles:
            points += [m, np.nextafter(m, np.float32(-9)), np.nextafter(m, np.float32(9))]
    flat = torch.from_numpy(np.concatenate(points))
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % (size - 1))).view(-1, size - 1)
    exact = torch.cat([torch.ones(len(flat), 1), flat], 1)
    return torch.cat([x, exact, exact * 4, -exact]) + 0.0  # no -0: the kernels give it the code of 0


def scale_of(tensor: BlockQTensor) -> Tensor:
    assert isinstance(tensor.params.scale, Tensor)
    return tensor.params.scale


# ------------------------------------------------------------------------------------------------------------ tables
def test_nf4_table() -> None:
    assert np.array_equal(
        get_format("nf4").values.astype(np.float32), functional.get_4bit_type("nf4", device="cpu").numpy()
    )


def test_create_normal_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own construction, which takes its quantiles from scipy where it is, here from torch."""

    def ppf(p: Tensor) -> Tensor:
        found: Tensor = torch.special.ndtri(p.double())
        return found

    monkeypatch.setitem(sys.modules, "scipy", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "scipy.stats", SimpleNamespace(norm=SimpleNamespace(ppf=ppf)))
    theirs = functional.create_normal_map().unique()
    assert np.array_equal(get_format("nf4").values.astype(np.float32), theirs.numpy())
    nearer = functional.create_normal_map(offset=1 - 1 / 30).unique()
    assert len(nearer) == 16 and not np.array_equal(get_format("nf4").values.astype(np.float32), nearer.numpy())


def test_fp4_table() -> None:
    theirs = functional.get_4bit_type("fp4", device="cpu")
    assert np.array_equal(get_format("fp4_bnb").values.astype(np.float32), theirs.numpy())


def test_af4_table() -> None:
    """Theirs is listed from the top down."""
    theirs = functional.get_4bit_type("af4", device="cpu").flip(0)
    assert np.array_equal(get_format("af4").values.astype(np.float32), theirs.numpy())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [8, 7, 6, 5, 4, 3])
def test_dynamic_maps(bits: int, signed: bool) -> None:
    theirs = functional.create_dynamic_map(signed=signed, max_exponent_bits=bits - 1, total_bits=bits).unique()
    ours = get_format(f"{'' if signed else 'u'}dynamic{bits}").values
    assert np.array_equal(ours.astype(np.float32), theirs.numpy())


# ------------------------------------------------------------------------------------------------------------ 4 bits
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize(("kind", "preset"), [("nf4", "nf4-bnb"), ("fp4", "fp4-bnb-cpu")])
def test_quantize_4bit(kind: str, preset: str, size: int) -> None:
    """Codes, scales and values of the package's CPU path: float32 midpoints, ties down, times the reciprocal."""
    x = data(200, size)
    packed, state = functional.quantize_4bit(x, blocksize=size, quant_type=kind)
    ours = Quantizer(preset, flat=size).quantize(x)
    assert torch.equal(scale_of(ours), state.absmax)
    theirs, codes = nibbles(packed), ours.unpacked().flatten()
    if kind == "fp4":  # its sort leaves open which of the two zeros comes first; both decode to 0
        theirs, codes = torch.where(theirs == 8, 0, theirs), torch.where(codes == 8, 0, codes)
    assert torch.equal(codes, theirs)
    assert torch.equal(ours.dequantize(), functional.dequantize_4bit(packed, state))


def test_where_the_two_rules_part() -> None:
    """NF4's published constants are its float32 midpoints; FP4's are not, by up to 4e-7."""
    nf4, fp4 = get_format("nf4"), get_format("fp4_bnb")
    assert np.array_equal(nf4.thresholds("native"), nf4.thresholds("half-down-float32"))
    apart = np.abs(fp4.thresholds("native") - fp4.thresholds("half-down-float32"))
    assert 0 < apart.max() < 4e-7
    x = data(200)
    cpu, cuda = (Quantizer(f"fp4-bnb{suffix}").quantize(x).dequantize() for suffix in ("-cpu", ""))
    assert 0 < (cpu != cuda).float().mean() < 0.01


def cuda_nf4(x: Tensor) -> Tensor:
    """The kernel's tree: the upper code needs x > constant (sheet of QLoRA)."""
    constants = [
        *(-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984),
        *(-0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668),
        *(0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011),
    ]
    return (x[..., None] > torch.tensor(constants)).sum(-1)


def cuda_fp4(x: Tensor) -> Tensor:
    """The kernel's tree over magnitudes; bit 3 is the sign of what is below zero."""
    constants = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]
    magnitude = torch.tensor([0, 1, 6, 7, 4, 5, 2, 3])[(x.abs()[..., None] > torch.tensor(constants)).sum(-1)]
    return magnitude + 8 * (x < 0)


@pytest.mark.parametrize(("kind", "kernel"), [("nf4", cuda_nf4), ("fp4", cuda_fp4)])
def test_cuda_comparisons(kind: str, kernel: type[object]) -> None:
    x = data(100)
    ours = Quantizer(f"{kind}-bnb").quantize(x)
    normalised = x * (1 / x.abs().amax(1, keepdim=True))
    assert torch.equal(ours.unpacked().int(), kernel(normalised).int())  # type: ignore[call-arg,attr-defined]


# ------------------------------------------------------------------------------------------------------------ 8 bits
def cuda_8bit(x: Tensor, code: Tensor) -> Tensor:
    """The kernel's tree search in a sorted map: seven halvings from 127, then one comparison with a midpoint."""
    pivot = torch.full(x.shape, 127)
    upper, lower = torch.full(x.shape, 255), torch.zeros(x.shape, dtype=torch.long)
    for step in (64, 32, 16, 8, 4, 2, 1):
        above = x > code[pivot]
        lower, upper = torch.where(above, pivot, lower), torch.where(above, upper, pivot)
        pivot = torch.where(above, pivot + step, pivot - step)
    value = code[pivot]
    above = x > value
    up = above & (x > (code[upper] + value) * 0.5)
    down = ~above & (x < (code[lower] + value) * 0.5)
    return torch.where(up, upper, torch.where(down, lower, pivot))


@pytest.mark.parametrize("name", ["dynamic8", "udynamic8"])
def test_8bit_cuda_search(name: str) -> None:
    """Ties to the even code at float32 midpoints: the search ends on an even pivot."""
    table = torch.from_numpy(get_format(name).values.astype(np.float32))
    middle = (table[1:] + table[:-1]) * 0.5
    x = torch.cat(
        [middle, torch.nextafter(middle, torch.tensor(2.0)), torch.nextafter(middle, torch.tensor(-2.0)), table]
    )
    x = torch.cat([x, torch.rand(50_000) * 2 - 1 if name == "dynamic8" else torch.rand(50_000)])
    assert torch.equal(encode(x, name, "nearest-even-float32").long(), cuda_8bit(x, table))


@pytest.mark.parametrize("signed", [True, False])
def test_quantize_blockwise(signed: bool) -> None:
    """Its CPU path looks up 65,536 cells of [-1, 1]: equal where a cell holds no decision, else ours is nearer."""
    table = functional.create_dynamic_map(signed=signed)
    preset = "state8" if signed else "state8-unsigned"
    x = torch.randn(300, 256) if signed else torch.rand(300, 256) ** 3
    theirs, state = functional.quantize_blockwise(x, code=table.clone(), blocksize=256)
    ours = Quantizer(preset).quantize(x)
    assert torch.equal(scale_of(ours), state.absmax)
    compare_cells(ours.unpacked().flatten(), theirs.flatten(), (x / x.abs().amax(1, keepdim=True)).flatten(), table)
    same = torch.equal(ours.unpacked(), theirs.view(ours.shape))
    values = functional.dequantize_blockwise(theirs, state)
    decoded = decode(theirs, ours.format.name) * scale_of(ours).view(-1, 1)
    assert torch.equal(values, decoded) and (same or not torch.equal(values, ours.dequantize()))


def compare_cells(ours: Tensor, theirs: Tensor, y: Tensor, table: Tensor) -> None:
    middle = ((table[1:] + table[:-1]) / 2).double()
    index = ((y.double() + 1) / 2 * 65535).round()
    nearest = (middle[None] - y.double()[:, None]).abs().amin(1)
    undecided = nearest < 2 / 65535  # a threshold in this cell or at its edge
    assert torch.equal(ours[~undecided], theirs[~undecided])
    assert (index >= 0).all() and undecided.any() and not undecided.all()
    error = [(table[codes.long()].double() - y.double()).abs() for codes in (ours, theirs)]
    assert (error[0] <= error[1] + 1e-7).all()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantization(kind: str) -> None:
    """compress_statistics: the codes, the offset, second-level scales and codes, and what they decode to."""
    x = torch.randn(1024, 64) * torch.rand(1024, 1)
    packed, state = functional.quantize_4bit(x, blocksize=64, quant_type=kind, compress_statistics=True)
    q = Quantizer(f"{kind}-bnb-dq")
    ours = (q if kind == "nf4" else q.replace(rounding="half-down-float32")).quantize(x)
    theirs, codes = nibbles(packed), ours.unpacked().flatten()
    if kind == "fp4":  # of two zeros
        theirs, codes = torch.where(theirs == 8, 0, theirs), torch.where(codes == 8, 0, codes)
    assert torch.equal(codes, theirs)
    nested = ours.params.scale
    assert isinstance(nested, BlockQTensor) and isinstance(nested.params.offset, Tensor)
    assert nested.params.offset.item() == state.offset.item()
    assert torch.equal(scale_of(nested), state.state2.absmax)
    y = (x.abs().amax(1) - state.offset).view(-1, 256) / scale_of(nested).view(-1, 1)
    compare_cells(nested.unpacked().flatten(), state.absmax.flatten(), y.flatten(), functional.create_dynamic_map())
    agree = nested.unpacked().flatten() == state.absmax.flatten()
    assert agree.float().mean() > 0.9
    values = functional.dequantize_4bit(packed, state).view(1024, 64)
    assert torch.equal(values[agree], ours.dequantize()[agree])


def test_dividing_by_stored_scales_is_better() -> None:
    """Why ``nf4-dq`` is not bitsandbytes' convention: codes found with the scales that will multiply them back."""
    x = torch.randn(4096, 64) * torch.rand(4096, 1)
    ours, theirs = (Quantizer(name).fake_quantize(x) for name in ("nf4-dq", "nf4-bnb-dq"))
    assert (ours - x).square().sum() < (theirs - x).square().sum()
