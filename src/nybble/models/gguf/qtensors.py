"""From parts of GGUF blocks to a QTensor and back, and from QTensors of other lines to those of a block type.

Nothing is rounded: what a type can't hold exactly is refused, and the message says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.formats import get_format
from nybble.models.gguf.types import CHUNK, BlockType, Bytes, WritableType, type_name, writable_types
from nybble.packing import get_layout
from nybble.qtensor import Inverse, QTensor, QuantParams
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer


# ------------------------------------------------------------------------------------------------ bytes -> QTensor
def build(kind: BlockType, blocks: Bytes, shape: tuple[int, ...]) -> BlockQTensor:
    """See :func:`nybble.models.gguf.types.decode`; ``blocks`` is [blocks, bytes of one]."""
    spec = kind.quantizer
    packed: dict[str, list[Tensor]] = {}
    for part in _chunks(blocks, kind):
        for name, codes in kind.read(part).items():
            piece = torch.from_numpy(np.ascontiguousarray(codes))
            whole = kind.paired and name == "codes"
            packed.setdefault(name, []).append(piece.reshape(-1) if whole else _packed(spec, name, piece))
    found = {name: torch.cat(pieces) if len(pieces) > 1 else pieces[0] for name, pieces in packed.items()}
    outer = {name: found[name].view(torch.float16) for name in ("d", "m") if name in found}
    scale_shape = spec.granularity.scale_shape(shape)
    scale = _nested(spec.scale_format, found.get("scale"), outer.get("d"), scale_shape)
    offset = None if "m" not in found else _nested(spec.offset_format, found.get("offset"), outer["m"], scale_shape)
    return BlockQTensor(
        spec.format, spec.granularity, shape, found["codes"], QuantParams(scale, offset=offset), spec.packing
    )


def _chunks(blocks: Bytes, kind: BlockType) -> Iterator[Bytes]:
    step = _step(kind)
    for start in range(0, len(blocks), step):
        yield blocks[start : start + step]


def _step(kind: BlockType) -> int:
    """How many blocks at a time: their codes fill whole bytes in every packing, of five digits too."""
    return max(1, CHUNK // (40 * kind.nbytes)) * 40


def _packed(spec: Quantizer, name: str, codes: Tensor) -> Tensor:
    inner = {"codes": spec, "scale": spec.scale_format, "offset": spec.offset_format}.get(name, "")
    if isinstance(inner, str):
        return codes.reshape(-1)
    packed: Tensor = get_layout(inner.packing).pack(codes.reshape(-1), inner.format.bits)
    return packed


def _nested(
    spec: str | Quantizer, codes: Tensor | None, outer: Tensor | None, shape: tuple[int, ...]
) -> Tensor | QTensor:
    """A scale or an offset: plain, or codes over ``outer``, over 1 where the file has none."""
    if isinstance(spec, str):
        assert outer is not None
        return outer.view(shape)
    assert codes is not None
    over: Tensor | None = None
    if not _exponents(spec):
        over = torch.ones(1, dtype=torch.float32) if outer is None else outer
        over = over.view(spec.granularity.scale_shape(shape))
    return BlockQTensor(spec.format, spec.granularity, shape, codes, QuantParams(over), spec.packing)


def _exponents(spec: Quantizer) -> bool:
    """Whether the codes are powers of two, under no scale."""
    return str(spec.scale) == "one"


# ------------------------------------------------------------------------------------------------ QTensor -> bytes
def taken_apart(kind: WritableType, weight: BlockQTensor) -> Iterator[Bytes]:
    """What :func:`nybble.models.gguf.types.encode` gives, some blocks at a time: [blocks, bytes of one].

    Raises:
        SchemeError: the weight is not of the type's line.
    """
    pieces = _pieces(kind.quantizer, weight)
    if pieces is None:
        raise SchemeError(f"{type_name(kind)} holds {kind.line!r}; got {line_of(weight)}.")
    if kind.paired:
        pieces["codes"] = _Piece(weight.codes.cpu(), weight.codes.numel())
    count = math.prod(weight.shape) // kind.block
    step = _step(kind)
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield kind.write({name: piece.blocks(start, stop, count) for name, piece in pieces.items()})


@dataclass(frozen=True)
class _Piece:
    """A part as it is stored: ``elements`` codes of ``bits`` in ``data``, or bytes (of float16, of pairs of codes)."""

    data: Tensor
    elements: int
    bits: int = 8
    packing: str = "dense"

    def blocks(self, start: int, stop: int, count: int) -> Bytes:
        """Those of blocks ``start .. stop`` of ``count``: [blocks, n]."""
        per = self.elements // count
        if self.bits == 8:
            return self.data[start * per : stop * per].view(-1, per).numpy()
        layout = get_layout(self.packing)
        data = self.data[layout.size(start * per, self.bits) : layout.size(stop * per, self.bits)]
        codes: Bytes = layout.unpack(data, self.bits, (stop - start) * per).view(stop - start, per).numpy()
        return codes


def _codes(weight: BlockQTensor) -> _Piece:
    return _Piece(weight.codes.cpu(), math.prod(weight.shape), weight.format.bits, weight.layout)


def _half(value: object) -> _Piece | None:
    if not isinstance(value, Tensor) or value.dtype != torch.float16:
        return None
    data = value.cpu().contiguous().view(-1).view(torch.uint8)
    return _Piece(data, data.numel())


def _pieces(spec: Quantizer, weight: BlockQTensor) -> dict[str, _Piece] | None:
    """The parts of a weight of the line ``spec``; None for another."""
    found: dict[str, _Piece | None] = {"codes": _codes(weight) if _alike(weight, spec) else None}
    sides = [("d", "scale", weight.params.scale, spec.scale_format)]
    if spec.scale.has_offset:
        sides.append(("m", "offset", weight.params.offset, spec.offset_format))
    elif weight.params.offset is not None:
        return None
    for outer, name, value, inner in sides:
        if isinstance(inner, str):
            found[outer] = _half(value)
            continue
        nested = isinstance(value, BlockQTensor) and _alike(value, inner)
        found[name] = _codes(value) if nested and isinstance(value, BlockQTensor) else None
        if nested and isinstance(value, BlockQTensor) and not (_exponents(inner) or inner.granularity.one_scale):
            found[outer] = _half(value.params.scale)
    whole = {name: piece for name, piece in found.items() if piece is not None}
    return whole if len(whole) == len(found) else None


def _alike(weight: BlockQTensor, spec: Quantizer) -> bool:
    same = (weight.format, weight.granularity, weight.layout) == (spec.format, spec.granularity, spec.packing)
    return same and weight.params.zero_point is None and weight.params.grid is None


def line_of(weight: QTensor) -> str:
    """What a QTensor is, in words of a quantizer line."""
    if not isinstance(weight, BlockQTensor):
        return f"a {type(weight).__name__}"
    words = [weight.format.name, str(weight.granularity)]
    for name in ("scale", "zero_point", "offset", "grid"):
        value = getattr(weight.params, name)
        if value is not None:
            words.append(f"{name}=" + (f"({line_of(value)})" if isinstance(value, QTensor) else _plain(value)))
    return "'" + " ".join(words) + "'"


def _plain(value: object) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__.lower()


# ------------------------------------------------------------------------------------------------ other lines
def exact_type(weight: QTensor) -> WritableType | None:
    """The smallest type that holds a weight as it is, told by its description alone (the meta device will do).

    Of scales in float32 only their values tell whether float16 holds them: :func:`fitted` looks at those.
    """
    if not isinstance(weight, BlockQTensor):
        return None
    kinds = [kind for kind in writable_types().values() if _holds(kind, weight)]
    alike = [kind for kind in kinds if _alike(weight, kind.quantizer)]
    return min(alike or kinds, key=lambda kind: kind.nbytes / kind.block, default=None)


def _holds(kind: BlockType, weight: BlockQTensor) -> bool:
    spec, params = kind.quantizer, weight.params
    if weight.shape[-1] % kind.block or params.zero_point is not None or params.grid is not None:
        return False
    if not _values(weight.format.name) <= _values(spec.format.name):
        return False
    if params.offset is not None and not spec.scale.has_offset:
        return False
    sides = [(params.scale, spec.scale_format)]
    if spec.scale.has_offset:
        sides.append((params.offset, spec.offset_format))
    nested = False
    for value, inner in sides:
        if isinstance(inner, str):
            if not (isinstance(value, Tensor) or (value is None and inner is spec.offset_format)):
                return False
            continue
        nested = True
        if not isinstance(value, BlockQTensor) or value.format != inner.format or value.layout != inner.packing:
            return False
        outer = value.params
        if outer.offset is not None or outer.zero_point is not None or outer.grid is not None:
            return False
        if inner.granularity.one_scale:
            if not value.granularity.one_scale or not isinstance(outer.scale, Tensor | Inverse | None):
                return False
        elif _exponents(inner):
            if outer.scale is not None:
                return False
        elif value.granularity != inner.granularity or not isinstance(outer.scale, Tensor):
            return False
    return weight.granularity == spec.granularity if nested else _coarser(weight, spec)


@cache
def _values(name: str) -> frozenset[float]:
    fmt = get_format(name)
    return frozenset(float(v) for v in fmt.values[fmt.encodable()])


def _coarser(weight: BlockQTensor, spec: Quantizer) -> bool:
    """Whether the weight's scales stand for whole blocks of the type."""
    if weight.granularity.factored or not (weight.granularity.rows_apart or weight.granularity.one_scale):
        return False
    count = math.prod(weight.granularity.scale_shape(weight.shape))
    wanted = spec.granularity.scale_shape(weight.shape)
    columns = wanted[-1]
    per_row = count // math.prod(wanted[:-1])
    return weight.granularity.one_scale or (per_row > 0 and columns % per_row == 0)


def fitted(kind: BlockType, weight: QTensor) -> BlockQTensor:
    """The same values as a QTensor of the type's own line.

    Args:
        kind: to be written.
        weight: of another line that the type holds: fewer codes, larger groups, scales in float32 that float16 has too.

    Raises:
        SchemeError: the type can't hold it exactly.
    """
    if not isinstance(weight, BlockQTensor) or not _holds(kind, weight):
        raise SchemeError(f"{type_name(kind)} holds {kind.line!r}; got {line_of(weight)}.")
    spec, params = kind.quantizer, weight.params
    codes = weight.codes
    if weight.format != spec.format or weight.layout != spec.packing:
        places = {value: code for code, value in reversed(list(enumerate(spec.format.values.tolist())))}
        table = torch.tensor([places.get(v, 0) for v in weight.format.values.tolist()], dtype=torch.uint8)
        codes = get_layout(spec.packing).pack(table[weight.unpacked().reshape(-1).long()], spec.format.bits)
    scale, offset = params.scale, params.offset
    if isinstance(spec.scale_format, str):
        assert isinstance(scale, Tensor)
        scale = _halves(weight, scale, spec, kind)
        if spec.scale.has_offset:
            assert offset is None or isinstance(offset, Tensor)
            offset = torch.zeros_like(scale) if offset is None else _halves(weight, offset, spec, kind)
    elif isinstance(scale, BlockQTensor) and spec.scale_format.granularity.one_scale:
        scale = replace(scale, granularity=spec.scale_format.granularity)
    return BlockQTensor(
        spec.format, spec.granularity, weight.shape, codes, QuantParams(scale, offset=offset), spec.packing
    )


def _halves(weight: BlockQTensor, value: Tensor, spec: Quantizer, kind: BlockType) -> Tensor:
    """A scale or offset of each block of the type, float16."""
    shape = spec.granularity.scale_shape(weight.shape)
    wide = value.reshape(1).expand(shape) if weight.granularity.one_scale else value
    if wide.shape != shape:
        rows = value.reshape(*shape[:-1], -1)
        wide = rows.repeat_interleave(shape[-1] // rows.shape[-1], -1)
    half = wide.to(torch.float16)
    if value.dtype != torch.float16 and not torch.equal(half.float(), wide.float()):
        raise SchemeError(
            f"{type_name(kind)} keeps scales in float16, and those of {line_of(weight)} are no such numbers; quantize "
            f"with scale_format=float16."
        )
    return half.contiguous()


def global_scale(weight: BlockQTensor) -> Tensor | None:
    """What NVFP4 blocks leave out: float32 [1], the number that multiplies all scales; None where there is none.

    A divisor becomes its reciprocal, rounded to float32.
    """
    inner = weight.params.scale
    if not isinstance(inner, BlockQTensor) or not inner.granularity.one_scale:
        return None
    outer = inner.params.scale
    if outer is None:
        return None
    assert isinstance(outer, Tensor | Inverse)
    value = 1.0 / outer.divisor.float() if isinstance(outer, Inverse) else outer.float()
    return value.reshape(1)


def with_global_scale(weight: BlockQTensor, scale: Tensor) -> BlockQTensor:
    """NVFP4 blocks under the number that the file has beside them (the inverse of :func:`global_scale`)."""
    inner = weight.params.scale
    assert isinstance(inner, BlockQTensor)
    one = scale.float().reshape(inner.granularity.scale_shape(inner.shape))
    return replace(weight, params=replace(weight.params, scale=replace(inner, params=replace(inner.params, scale=one))))
