"""GGUF's block types: bytes to QTensor and back, without a loss; one type a file.

A type is a :class:`BlockType` record: a quantizer line, which says what the numbers mean, and the fields of a block,
which say where their bits are. The scale of a K-quant is a QTensor itself (``uint6 group=8`` over float16), and so is
its minimum, whose own scale is stored without the sign that ``x_hat = scale * code + offset`` gives it. Nothing here
knows a type by name.

Sources: github.com/ggml-org/ggml, ``ggml-common.h`` (the structs) and ``docs/gguf.md``; the package gguf,
``quants.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nybble.core.errors import FileError, UsageError
from nybble.core.registry import Registry
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Parts = dict[str, Bytes]
"""Of some blocks, [blocks, n] each: ``codes``, ``scale`` and ``offset`` as codes of their formats, one in a byte (the
``codes`` of a type that is ``paired`` two in a byte, as a QTensor has them); ``d`` and ``m``, the outermost scale and
offset, as the bytes of float16."""

_ELEMENTS: dict[int, np.dtype[Any]] = {
    size: np.dtype(name) for size, name in ((1, "u1"), (2, "u2"), (4, "u4"), (8, "u8"), (16, "c16"))
}

REGISTRY = Registry("nybble.models.gguf.types", "GGUF block type", lambda part: isinstance(part, BlockType))
CHUNK = 1 << 17
"""Bytes of blocks that are taken apart at a time: they stay in the cache."""


def runs(data: Bytes) -> np.ndarray[Any, Any]:
    """The last dimension as one element, so that runs are copied whole."""
    size = int(data.shape[-1])
    whole: np.dtype[Any] = _ELEMENTS[size] if size in _ELEMENTS else np.dtype((np.void, size))
    found: np.ndarray[Any, Any] = data.view(whole)[..., 0]
    return found


class Field(Protocol):
    """Some neighbouring bytes of a block."""

    @property
    def nbytes(self) -> int:
        """How many."""

    def read(self, data: Bytes) -> Parts:
        """``[blocks, nbytes]`` -> bits of parts, where they belong; bits of one part in several fields are joined."""


class WritableField(Field, Protocol):
    """One that can be written, too."""

    def write(self, parts: Parts) -> Bytes:
        """The inverse of ``read``: ``[blocks, nbytes]``."""


@dataclass(frozen=True, kw_only=True)
class BlockType:
    """A type of GGUF, as it is read.

    Attributes:
        number: ggml's own. block: elements of a block, always neighbours in a row.
        line: the quantizer whose QTensors it holds; ``BlockQTensor.spec`` of what is read says the same.
        fields: of a block, in the file's order.
        flips: part -> bits that the file has the other way round (an integer stored plus 2^(bits-1)).
        negative: the file has the offset's scale without its minus.
    """

    number: int
    block: int
    line: str
    fields: tuple[Field, ...]
    flips: Mapping[str, int] = field(default_factory=dict)
    negative: bool = False

    @cached_property
    def quantizer(self) -> Quantizer:
        """Of :attr:`line`."""
        return Quantizer(self.line)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return sum(each.nbytes for each in self.fields)

    @cached_property
    def paired(self) -> bool:
        """Whether codes have four bits and stay two in a byte."""
        from nybble.models.gguf.types._fields import Pairs

        return any(isinstance(each, Pairs) for each in self.fields)

    @property
    def scaled_apart(self) -> bool:
        """Whether the scale of all scales is no part of a block but a tensor of its own in the file (NVFP4)."""
        inner = self.quantizer.scale_format
        return isinstance(inner, Quantizer) and inner.granularity.one_scale and str(inner.scale) != "one"

    @property
    def as_it_is(self) -> bool:
        """Whether any bytes are blocks, and those that come back of them; ternary digits have several spellings."""
        return not self.scaled_apart and self.quantizer.format.name != "ternary"

    def read(self, blocks: Bytes) -> Parts:
        """``[blocks, nbytes]`` -> parts."""
        parts: Parts = {}
        at = 0
        for each in self.fields:
            for name, bits in each.read(blocks[:, at : at + each.nbytes]).items():
                parts[name] = parts[name] | bits if name in parts else bits
            at += each.nbytes
        return self._flipped(parts)

    def _flipped(self, parts: Parts) -> Parts:
        flipped = {name: parts[name] ^ np.uint8(bits) for name, bits in self.flips.items()}
        found = parts | flipped
        if self.negative:
            found["m"] = found["m"] ^ np.array([0, 0x80], np.uint8)
        return found


@dataclass(frozen=True, kw_only=True)
class WritableType(BlockType):
    """A type that nybble writes: all but those whose values come from a code book of vectors."""

    fields: tuple[WritableField, ...]

    def write(self, parts: Parts) -> Bytes:
        """The inverse of :meth:`read`."""
        parts = self._flipped(parts)
        blocks = np.empty((len(parts["codes"]), self.nbytes), np.uint8)
        at = 0
        for each in self.fields:
            runs(blocks[:, at : at + each.nbytes])[:] = runs(each.write(parts))
            at += each.nbytes
        return blocks


def writable(kind: BlockType) -> WritableType:
    """``kind``, if it is written.

    Raises:
        UsageError: it is only read.
    """
    if not isinstance(kind, WritableType):
        raise UsageError(f"{type_name(kind)} is read but not written: its values come from a code book of vectors.")
    return kind


@cache
def writable_types() -> Mapping[str, WritableType]:
    """Every type that is written, under its name in the registry."""
    return {name: kind for name, kind in REGISTRY.all().items() if isinstance(kind, WritableType)}


def block_type(name: str) -> BlockType:
    """The type called ``name``, as llama.cpp spells it in any case: ``Q4_K``, ``q4_k``.

    Raises:
        UsageError: there is none; the message has the closest.
    """
    found: BlockType = REGISTRY.get(name.lower().replace("_", "-"))
    return found


def type_name(kind: BlockType) -> str:
    """As llama.cpp spells it: ``Q4_K``."""
    return _names()[id(kind)]


@cache
def _names() -> Mapping[int, str]:
    """By the part's identity: it has no hash, and the registry asks Python's imports for each."""
    return {id(part): name.replace("-", "_").upper() for name, part in REGISTRY.all().items()}


@cache
def by_number() -> Mapping[int, BlockType]:
    """Every block type under ggml's number."""
    return {part.number: part for part in REGISTRY.all().values()}


def decode(kind: BlockType, data: Bytes, shape: tuple[int, ...]) -> BlockQTensor:
    """A tensor's bytes as a QTensor whose values are those of gguf's dequantizer, bit for bit in float32.

    Args:
        kind: of the tensor.
        data: uint8, all its bytes in any shape; not kept.
        shape: of the tensor, columns last.

    Raises:
        FileError: sizes that don't fit, or bytes that mean nothing (a scale of NVFP4 with a sign).
    """
    from nybble.models.gguf.qtensors import build

    check_shape(kind, shape)
    count = math.prod(shape) // kind.block
    if data.size != count * kind.nbytes:
        raise FileError(
            f"a {type_name(kind)} tensor {list(shape)} takes {count * kind.nbytes} bytes; there are {data.size}."
        )
    return build(kind, np.ascontiguousarray(data).reshape(count, kind.nbytes), shape)


def encode(kind: BlockType, weight: BlockQTensor) -> Tensor:
    """The inverse of :func:`decode`: uint8 [*shape[:-1], bytes of a row].

    Args:
        kind: to write.
        weight: of the type's own line; :func:`nybble.models.gguf.qtensors.fitted` makes such of others.

    Raises:
        UsageError: a type that is only read. GranularityError: columns that its blocks don't divide.
    """
    blocks = np.concatenate(list(encoded(kind, weight)))
    return torch.from_numpy(blocks).view(*weight.shape[:-1], -1)


def encoded(kind: BlockType, weight: BlockQTensor) -> Iterator[Bytes]:
    """What :func:`encode` gives, some blocks at a time: uint8 [blocks, bytes of one]; raises as that does."""
    from nybble.models.gguf.qtensors import taken_apart

    found = writable(kind)
    check_shape(kind, weight.shape)
    return taken_apart(found, weight)


def check_shape(kind: BlockType, shape: tuple[int, ...]) -> None:
    """Raise FileError unless rows of ``shape`` are whole blocks."""
    if not shape or min(shape) < 1 or shape[-1] % kind.block:
        raise FileError(f"rows of {type_name(kind)} are blocks of {kind.block}; a tensor {list(shape)} has none such.")
