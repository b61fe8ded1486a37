"""Weights of integers in 32-bit words, as GPTQ's and AWQ's files have them; auto-round writes both.

GPTQ: ``qweight`` int32 [words of in, out], ``qzeros`` int32 [groups, words of out], ``scales`` [groups, out], ``g_idx``
int32 [in]. AWQ: ``qweight`` int32 [in, words of out], the rest alike. x = scale * (code - zero point).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nybble.core.errors import FileError
from nybble.models.sources.layouts import FLOATS, Files, PackedWeight, words
from nybble.models.sources.layouts._pieces import (
    block,
    group_word,
    in_order,
    integers,
    packed,
    reordered,
    stream_rows,
)
from nybble.qtensor import QTensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
ROLES = {"qweight": "codes", "scales": "scales", "qzeros": "offsets", "g_idx": "tables"}
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""Bits of a code -> those of each plane, the lowest first; of other widths there is one plane."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """How the codes of a layer lie.

    Attributes:
        bits: of a code. size: columns of a group; below 1: whole rows.
        less: what was taken from zero points: 1 in GPTQ's first format, else 0.
        planar: codes cut into planes of bits that divide words (GPTQModel's gptq_p).
    """

    bits: int
    size: int
    less: int = 0
    planar: bool = False


def gptq_weight(module: str, how: Words, files: Files) -> PackedWeight:
    """The weight of a module with GPTQ's tensors.

    Raises:
        FileError: they are missing, or contradict each other.
    """
    bits = how.bits
    count, rows = files.matrix(f"{module}.qweight", ("I32",))
    columns = count * 32 // bits
    index = f"{module}.g_idx"
    if index in files.entries:
        columns = files.need(index, ("I32",)).nbytes // 4
    if words(columns, bits) != count:
        raise FileError(f"{files.place}: {module}.qweight has {count} words a column; {columns} inputs need another.")
    if how.planar and bits in PLANES and (columns % 32 or rows % 32):
        raise FileError(f"{files.place}: {module} is {rows} x {columns}; planes of {bits} bits are of 32 codes.")
    size = columns if how.size < 1 else min(how.size, columns)
    groups = -(-columns // size)
    files.need(f"{module}.scales", FLOATS, (groups, rows))
    files.need(f"{module}.qzeros", ("I32",), (groups, words(rows, bits)))
    parts = {role: f"{module}.{role}" for role in ("qweight", "scales", "qzeros")}
    if index in files.entries:
        files.need(index, ("I32",), (columns,))
        parts["g_idx"] = index
    build = partial(_build_gptq, how=how, size=size, shape=(rows, columns))
    return PackedWeight(name=f"{module}.weight", shape=(rows, columns), parts=parts, build=build, kept_as=ROLES)


def _build_gptq(t: Mapping[str, Tensor], *, how: Words, size: int, shape: tuple[int, int]) -> list[QTensor]:
    rows, columns = shape
    bits = how.bits
    cut = _planes if how.planar and bits in PLANES else stream_rows
    codes = cut(t["qweight"].T.contiguous(), bits, columns)
    order = in_order(t["g_idx"], size) if "g_idx" in t else None
    if order is not None:
        codes = codes[:, order.long()]
    points = cut(_raised(t["qzeros"], how), bits, rows)
    if how.less and 32 % bits:
        points = (points.to(torch.int16) + how.less & (1 << bits) - 1).to(torch.uint8)
    zero = integers(points.T.contiguous(), f"uint{bits}")
    scale = t["scales"].T.contiguous()
    found = block(f"uint{bits}", group_word(size, columns), shape, packed(codes, bits), scale, zero)
    return [reordered(found, order)]


def _raised(stored: Tensor, how: Words) -> Tensor:
    """Words of zero points, with what was taken from each given back.

    Writers subtract it from whole words, so that a zero point of 0 borrows from its neighbour; only where codes go
    across words (3, 5, 6, 7 bits) from each by itself.
    """
    if not how.less or 32 % how.bits:
        return stored
    ones = sum(1 << place for place in range(0, 32, how.bits))
    return ((stored.long() + ones) & 0xFFFFFFFF).to(torch.int32)


def _planes(stored: Tensor, bits: int, columns: int) -> Tensor:
    """int32 [rows, words] in planes -> uint8 [rows, columns]; 32 codes are in as many words as they have bits."""
    rows = len(stored)
    blocks = stored.reshape(rows, -1, bits)
    found = torch.zeros((rows, blocks.shape[1], 32), dtype=torch.uint8)
    at = 0
    for width in PLANES[bits]:
        plane = blocks[:, :, at : at + width].reshape(rows, -1)
        found |= stream_rows(plane.contiguous(), width, 32 * blocks.shape[1]).view(found.shape) << at
        at += width
    return found.view(rows, -1)[:, :columns]


def awq_weight(module: str, how: Words, files: Files) -> PackedWeight:
    """The weight of a module with AWQ's tensors.

    Raises:
        FileError: they are missing, or contradict each other.
    """
    columns, count = files.matrix(f"{module}.qweight", ("I32",))
    rows = count * 32 // how.bits
    if rows % 8 or words(rows, how.bits) != count:
        raise FileError(f"{files.place}: {module}.qweight has rows of {count} words; eights of codes don't fill them.")
    size = columns if how.size < 1 else how.size
    if columns % size:
        raise FileError(f"{files.place}: {module} has {columns} inputs, which groups of {size} don't divide.")
    files.need(f"{module}.scales", FLOATS, (columns // size, rows))
    files.need(f"{module}.qzeros", ("I32",), (columns // size, count))
    parts = {role: f"{module}.{role}" for role in ("qweight", "scales", "qzeros")}
    build = partial(_build_awq, bits=how.bits, size=size, shape=(rows, columns))
    return PackedWeight(name=f"{module}.weight", shape=(rows, columns), parts=parts, build=build, kept_as=ROLES)


def _build_awq(t: Mapping[str, Tensor], *, bits: int, size: int, shape: tuple[int, int]) -> list[QTensor]:
    rows, columns = shape
    zero = integers(_outputs(t["qzeros"], bits, rows), f"uint{bits}")
    codes = packed(_outputs(t["qweight"], bits, rows), bits)
    return [block(f"uint{bits}", group_word(size, columns), shape, codes, t["scales"].T.contiguous(), zero)]


def _outputs(stored: Tensor, bits: int, rows: int) -> Tensor:
    """int32 [n, words] -> uint8 [rows, n], in the order of the outputs."""
    codes = stream_rows(stored, bits, rows).view(len(stored), -1, 8)
    back = torch.tensor([AWQ_ORDER.index(i) for i in range(8)], dtype=torch.int64)
    return codes[:, :, back].reshape(len(stored), rows).T.contiguous()
