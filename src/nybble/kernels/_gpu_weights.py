"""A BlockQTensor as the GPU's kernels read it: its own tensors, nothing expanded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nybble.kernels._places import blocks_of, outer_block
from nybble.ops.rounding import decode_table
from nybble.packing import get_layout
from nybble.qtensor import Inverse, QTensor, dense
from nybble.qtensor.block import BlockQTensor

LINEAR, E2M1, TABLE = range(3)
PLAIN, E4M3, E8M0, LOOKED_UP = range(4)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Scales:
    """Of the blocks of a matrix, in their order.

    Attributes:
        values: one number a block, or uint8 codes.
        how: PLAIN, or how codes are read: E4M3, E8M0, LOOKED_UP.
        table: float32 [256] of LOOKED_UP.
        outer: float32 [blocks / outer_block], or None.
        outer_block: neighbours that share an outer scale.
        add: float32 [1], to each scale, or None.
    """

    values: Tensor
    how: int = PLAIN
    table: Tensor | None = None
    outer: Tensor | None = None
    outer_block: int = 1
    add: Tensor | None = None

    @property
    def outers(self) -> int:
        """0: no outer scale; 1: one; 2: several."""
        return 0 if self.outer is None else 1 + (self.outer.numel() > 1)


@dataclass(frozen=True)
class Weight:
    """One matrix [n, k].

    Attributes:
        codes: uint8, dense, contiguous, at a multiple of 16 bytes.
        kind: LINEAR: value = (code ^ flip) + base; E2M1; TABLE.
        table: float32 [2**bits].
        group, across, share: columns of a block, blocks in a row, rows that share them.
        zero, offset: a number a block, or None: value = (code's - zero) * scale + offset.
        kept: what was found out about calls with it, by whoever makes them.
    """

    n: int
    k: int
    bits: int
    codes: Tensor
    kind: int
    table: Tensor
    flip: int
    base: float
    group: int
    across: int
    share: int
    scales: Scales
    zero: Tensor | None
    offset: Tensor | None
    kept: dict[Any, Any] = field(init=False, default_factory=dict, compare=False, repr=False)

    @property
    def unit(self) -> int:
        """Codes that fill whole words; see ``_triton_products``."""
        return 32 if self.bits == 3 else 32 // self.bits

    @property
    def whole(self) -> bool:
        """Whether rows are whole units, and blocks too."""
        return self.bits <= 4 and self.k % self.unit == 0 and (self.across == 1 or self.group % self.unit == 0)

    def nbytes(self) -> int:
        """Bytes that every product has to read of it."""
        parts = (self.codes, self.scales.values, self.scales.outer, self.zero, self.offset)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def weight_of(qtensor: QTensor) -> Weight | str:
    """The record of a QTensor, or what it is that the kernels can't multiply with."""
    if not isinstance(qtensor, BlockQTensor):
        return f"weights of the kind {qtensor.kind}"
    bits, params = qtensor.format.bits, qtensor.params
    if len(qtensor.shape) != 2 or math.prod(qtensor.shape) == 0:
        return f"a shape of {list(qtensor.shape)}"
    if bits > 8 or qtensor.layout != "dense":
        return f"codes of {bits} bits in the layout {qtensor.layout}"
    n, k = qtensor.shape
    blocks = blocks_of(str(qtensor.granularity), n, k)
    if blocks is None:
        return f"scales by {qtensor.granularity} of {k} columns"
    codes = _aligned(qtensor.codes)
    table = decode_table(qtensor.format.name, codes.device) if params.grid is None else params.grid.float()
    if table.numel() != 2**bits:
        return f"{table.numel()} values in {bits} bits"
    group, across, share = blocks
    count = across * (n // share)
    scales = _scales(params.scale, count, codes.device)
    if isinstance(scales, str):
        return f"scale {scales}"
    sides = {}
    for name, value in (("zero", params.zero_point), ("offset", params.offset)):
        side = _side(value, count)
        if isinstance(side, str):
            return f"{name} {side}"
        sides[name] = side
    grid = params.grid
    kind, flip, base = _kind_of(qtensor.format.name) if grid is None else _kind(table.cpu(), bits)
    return Weight(
        n, k, bits, codes, kind, table.contiguous(), flip, base, group, across, share, scales, sides["zero"],
        sides["offset"],
    )  # fmt: skip


def _aligned(codes: Tensor) -> Tensor:
    codes = codes.detach().contiguous()
    return codes if codes.data_ptr() % 16 == 0 else codes.clone()


@lru_cache(maxsize=256)
def _kind_of(name: str) -> tuple[int, int, float]:
    table = decode_table(name, torch.device("cpu"))
    return _kind(table, table.numel().bit_length() - 1)


def _kind(table: Tensor, bits: int) -> tuple[int, int, float]:
    """How values are found without looking them up: what, and its ``flip`` and ``base``."""
    codes = torch.arange(2**bits)
    for flip in (0, 2 ** (bits - 1)):
        base = float(table[flip])
        if torch.equal(table, ((codes ^ flip) + base).float()):
            return LINEAR, flip, base
    if bits == 4 and torch.equal(table, torch.tensor([*_E2M1, *(-value for value in _E2M1)])):
        return E2M1, 0, 0.0
    return TABLE, 0, 0.0


def _scales(value: Any, count: int, device: torch.device) -> Scales | str:
    if value is None:
        return Scales(torch.ones(1, device=device).expand(count).contiguous())
    if isinstance(value, Tensor):
        found = _numbers(value, count)
        return found if isinstance(found, str) else Scales(found)
    if not isinstance(value, BlockQTensor):
        return f"of the kind {getattr(value, 'kind', type(value).__name__)}"
    params, bits, name = value.params, value.format.bits, value.format.name
    if bits > 8 or params.zero_point is not None or math.prod(value.shape) != count:
        return f"in {name}"
    add = None
    if params.offset is not None:
        offset = dense(params.offset)
        if offset.numel() != 1:
            return "with offsets of its own"
        add = offset.float().reshape(1)
    table = decode_table(name, device) if params.grid is None else params.grid.float()
    how = {"float8_e4m3fn": E4M3, "float8_e8m0fnu": E8M0}.get(name, LOOKED_UP) if params.grid is None else LOOKED_UP
    how = how if add is None else LOOKED_UP
    codes = value.codes if bits == 8 else get_layout(value.layout).unpack(value.codes, bits, count)
    outer, size = None, 1
    if params.scale is not None:
        stored = params.scale.divisor if isinstance(params.scale, Inverse) else params.scale
        if not isinstance(stored, Tensor | QTensor):
            return "with factors"
        outer = dense(stored).float().reshape(-1).contiguous()
        outer = 1 / outer if isinstance(params.scale, Inverse) else outer
        found_size = outer_block(str(value.granularity), value.shape, outer.numel())
        if found_size is None:
            return f"by {value.granularity}"
        size = found_size
    table = functional.pad(table, (0, 256 - table.numel()))  # the compiled kernels copy it whole
    return Scales(codes.detach().contiguous(), how, table.contiguous(), outer, size, add)


def _numbers(value: Tensor, count: int) -> Tensor | str:
    value = value.detach().reshape(-1)
    value = value if value.dtype in _FLOATS else value.float()
    if value.numel() == 1:
        value = value.expand(count)
    return value.contiguous() if value.numel() == count else f"of {value.numel()} values for {count} blocks"


def _side(value: Any, count: int) -> Tensor | str | None:
    """Of a zero point or an offset: whole numbers in a byte each where they are some."""
    if value is None:
        return None
    if not isinstance(value, Tensor | QTensor):
        return f"of the kind {type(value).__name__}"
    found = _numbers(dense(value), count)
    if isinstance(found, str) or not isinstance(value, BlockQTensor) or value.params.scale is not None:
        return found
    return found.to(torch.int8) if value.format.is_integer and max(abs(value.format.values)) <= 127 else found
