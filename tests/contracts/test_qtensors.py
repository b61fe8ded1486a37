"""What every kind of quantized tensor must do: come back from a file the same, and know their bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.contracts.inputs import same
from torch import Tensor

from nybble.core.errors import FileError
from nybble.core.tensorfile import write_tensorfile
from nybble.qtensor import REGISTRY, Factored, Inverse, QTensor, QuantParams, dense, from_spec
from nybble.qtensor.block import BlockQTensor
from nybble.qtensor.low_rank_sum import LowRankSum
from nybble.qtensor.mixed_bits import MOST, MixedBits
from nybble.qtensor.outer_scaled import OuterScaled
from nybble.qtensor.split import SplitQTensor, pack_members
from nybble.qtensor.vector import VectorQTensor
from nybble.quantizer import Quantizer

SHAPE = (12, 64)


def x() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))


def _factored(combine: str) -> BlockQTensor:
    q = Quantizer("int4 channel")
    columns = 2.0 ** -torch.randint(0, 4, (1, 64), generator=torch.Generator().manual_seed(0)).float()
    return q.quantize(x(), QuantParams(Factored((q.fit(x()).scale, columns), combine)))  # type: ignore[arg-type]


def _vector(scale: Tensor | QTensor | None, entries: int, dtype: torch.dtype) -> VectorQTensor:
    generator = torch.Generator().manual_seed(1)
    book = torch.randn(entries, 4, generator=generator).to(dtype)
    index = torch.randint(entries, (12 * 16,), generator=generator)
    return VectorQTensor.make(SHAPE, book, index, scale)


def _split() -> SplitQTensor:
    index = torch.randperm(64, generator=torch.Generator().manual_seed(3)).int()
    part = x()[:, index.long()]
    parts = (
        Quantizer("int4 token").quantize(part[:, :40]),
        part[:, 40:48].half(),
        Quantizer("nvfp4").quantize(part[:, 48:]),
    )
    return SplitQTensor(SHAPE, 1, index, parts)


def _members() -> SplitQTensor:
    """Three parts whose slices are in order: two bits a slice."""
    members = torch.arange(64).remainder(5).clamp(max=2)
    parts = [x()[:, members == part] for part in range(3)]
    made = Quantizer("binary channel scale=mean(offset=true)").quantize(parts[0]), parts[1].half()
    return SplitQTensor(SHAPE, 1, pack_members(members, 3), (*made, Quantizer("int4 channel").quantize(parts[2])))


def _outer_scaled() -> OuterScaled:
    rows, columns = torch.rand(12, 1), torch.rand(1, 64).half()
    base = Quantizer("binary group=16 scale=mean(offset=true)").quantize(x())
    return OuterScaled(base, (Quantizer("uint8 tensor").quantize(rows), columns))


def _low_rank() -> LowRankSum:
    base = Quantizer("float4_e2m1fn group=32").quantize(x())
    u, s, v = torch.linalg.svd(x() - base.dequantize(), full_matrices=False)
    a = (u[:, :4] * s[:4]).contiguous()
    return LowRankSum(base, Quantizer("float8_e4m3fn channel").quantize(a), v[:4].half().contiguous())


def _mixed(least: int = 1) -> MixedBits:
    bits = torch.arange(96) % (MOST + 1 - least) + least
    return MixedBits.make(x(), bits, least)


MADE: dict[str, Callable[[], QTensor]] = {
    "block": lambda: Quantizer("int4 group=32 symmetric=false").quantize(x()),
    "block nested": lambda: Quantizer("nf4-dq").quantize(x()),
    "block divisor": lambda: Quantizer("nvfp4-ct").quantize(x()),
    "block offset": lambda: Quantizer("int4_full group=32 scale=minmax(offset=true)").quantize(x()),
    "block product": lambda: _factored("product"),
    "block min": lambda: Quantizer("dynamic4 rank1").quantize(x()),
    "block no scale": lambda: Quantizer("float8_e5m2 scale=one").quantize(x()),
    "block thresholds": lambda: Quantizer("uint2 tensor").quantize(
        x().abs(), QuantParams(torch.ones(1, 1), thresholds=torch.tensor([0.3, 0.8, 1.9]))
    ),
    "block grid": lambda: Quantizer("nf4 flat=32").quantize(
        x(), QuantParams(torch.ones(24), grid=torch.randn(16, generator=torch.Generator().manual_seed(4)))
    ),
    "block base3": lambda: Quantizer("ternary scale=mean packing=base3").quantize(x()),
    "block 3-d": lambda: Quantizer("int3 group=16").quantize(x().reshape(3, 4, 64)),
    "block scalar": lambda: Quantizer("int8 tensor").quantize(torch.tensor(1.5)),
    "vector": lambda: _vector(None, 200, torch.float16),
    "vector plain scale": lambda: _vector(torch.rand(12, 1), 16, torch.float32),
    "vector nested scale": lambda: _vector(
        Quantizer("float8_e4m3fn tensor").quantize(torch.rand(12, 1)), 3, torch.bfloat16
    ),
    "vector 16 bits": lambda: _vector(None, 300, torch.float32),
    "split": _split,
    "split members": _members,
    "outer-scaled": _outer_scaled,
    "low-rank-sum": _low_rank,
    "mixed-bits": _mixed,
    "mixed-bits of one width": lambda: MixedBits.make(x(), torch.full((1,), 11), 11),
}


def test_every_kind_is_here() -> None:
    assert {make().kind for make in MADE.values()} == set(REGISTRY.names())


@pytest.mark.parametrize("name", MADE)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """Through a safetensors file, read by the safetensors package."""
    tensor = MADE[name]()
    path = tmp_path / "t.safetensors"
    prefixed = {f"weight.{k}": t for k, t in tensor.tensors().items()}
    write_tensorfile(path, prefixed, {"weight": json.dumps(tensor.spec())})
    with safe_open(path, "pt") as file:
        spec = json.loads(file.metadata()["weight"])
    loaded = from_spec(spec, {k.removeprefix("weight."): t for k, t in load_file(path).items()})
    assert type(loaded) is type(tensor) and loaded.shape == tensor.shape and loaded.spec() == tensor.spec()
    assert loaded.tensors().keys() == tensor.tensors().keys()
    for key, value in tensor.tensors().items():
        assert same(loaded.tensors()[key], value)
    for dtype in (torch.float32, torch.bfloat16):
        out = loaded.dequantize(dtype)
        assert out.dtype == dtype and out.shape == tensor.shape
        assert same(out, tensor.dequantize(dtype))


@pytest.mark.parametrize("name", MADE)
def test_bytes(name: str) -> None:
    tensor = MADE[name]()
    total = sum(t.numel() * t.element_size() for t in tensor.tensors().values())
    assert tensor.nbytes() == total
    assert tensor.bits_per_element() == 8 * total / math.prod(tensor.shape)
    assert set(tensor.roles()) == set(tensor.tensors())
    assert set(tensor.roles().values()) <= {"codes", "scales", "offsets", "tables", "unquantized"}
    assert sum(tensor.bytes_by_role().values()) == total
    assert all(count >= 0 for count in tensor.bytes_by_role().values())


@pytest.mark.parametrize("name", MADE)
def test_moved(name: str) -> None:
    """Everything goes along, parts of parts too; the device that has no values shows what stayed behind."""
    tensor = MADE[name]()
    before = tensor.dequantize()
    moved = tensor.to("meta")
    assert type(moved) is type(tensor) and moved.shape == tensor.shape and moved.spec() == tensor.spec()
    assert all(t.is_meta for t in moved.tensors().values()) and moved.nbytes() == tensor.nbytes()
    assert moved.dequantize(torch.bfloat16).is_meta
    assert not any(t.is_meta for t in tensor.tensors().values()) and same(tensor.dequantize(), before)


@pytest.mark.parametrize("name", MADE)
def test_a_missing_or_wrong_tensor_is_a_file_error(name: str) -> None:
    tensor = MADE[name]()
    for key, value in tensor.tensors().items():
        left = {k: t for k, t in tensor.tensors().items() if k != key}
        with pytest.raises(FileError):
            from_spec(tensor.spec(), left)
        if value.numel() > 1:
            with pytest.raises(FileError):
                from_spec(tensor.spec(), left | {key: value.flatten()[:-1]})
    with pytest.raises(FileError, match="unknown"):
        from_spec({**tensor.spec(), "kind": "nothing"}, tensor.tensors())


def test_values_by_hand() -> None:
    """The equation of each kind, from its tensors."""
    vector = _vector(torch.rand(12, 1), 16, torch.float32)
    index = torch.randint(16, (12 * 16,), generator=_after_book(16))
    want = vector.codebook[index].reshape(SHAPE)
    assert torch.equal(vector.dequantize(), want * vector.scale)  # type: ignore[operator]

    split = _split()
    for i, column in enumerate(split.index.tolist()):
        if 40 <= i < 48:
            assert torch.equal(split.dequantize()[:, column], x()[:, column].half().float())
    low_rank = _low_rank()
    assert torch.equal(low_rank.dequantize(), low_rank.base.dequantize() + dense(low_rank.a) @ dense(low_rank.b))
    error, before = (low_rank.dequantize() - x()).norm(), (low_rank.base.dequantize() - x()).norm()
    assert error < before

    q = Quantizer("nvfp4-ct").quantize(x())
    scale = q.params.scale
    assert isinstance(scale, BlockQTensor) and isinstance(scale.params.scale, Inverse)
    codes, g = scale.unpacked().view(torch.float8_e4m3fn).float(), scale.params.scale.divisor
    table = torch.tensor(q.format.values).float()
    assert torch.equal(
        q.dequantize(), (table[q.unpacked().long()].view(12, 4, 16) * (codes / g)[..., None]).view(SHAPE)
    )


def _after_book(entries: int) -> torch.Generator:
    generator = torch.Generator().manual_seed(1)
    torch.randn(entries, 4, generator=generator)
    return generator
