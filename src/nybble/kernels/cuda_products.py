"""Products of packed weights on NVIDIA's GPUs, in Triton; what its kernels can't read goes the readable way.

A few rows of x are multiplied by CUDA C++ where that can be compiled. In Triton one row is a sum of float32, up
to ``ROWS`` go to the tensor cores by a kernel that decodes tiles of W. For more W is expanded, a part at a time, and
multiplied with by cuBLAS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional

from nybble.kernels import _few_rows
from nybble.kernels import _triton_products as kernels
from nybble.kernels._gpu import INTERPRETED, elsewhere
from nybble.kernels._gpu_weights import TABLE, Weight, weight_of
from nybble.kernels._places import kept_with
from nybble.nn.products import packed_linear, qtensor_of, reference

ROWS = 64
"""Of x, up to which Triton decodes tiles of W for each product; beyond, W is expanded (measured on an H100)."""
FEW, FEW_LOOKED_UP = 16, 64
"""Of x, up to which the compiled CUDA kernels are taken; the second where Triton would have to look values up."""
COMPILED = True
"""Whether the CUDA kernels are taken where they can be compiled."""
PART = 1 << 26
"""Elements of W that are expanded at a time: on an H100 362 us for 14336 x 4096 and 2,048 rows, 395 for 1 << 24."""
TRIED = ((32, 4, 32, 3, 2), (64, 4, 32, 3, 4), (64, 4, 32, 3, 1), (128, 4, 32, 3, 2))
_PLAN = "_nybble_gpu_weight"

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
    raise ImportError(f"Triton {triton.__version__}; the kernels need 3.6 or later")


@dataclass(frozen=True)
class Tile:
    """What a program of a kernel does: rows of W, units of its columns, rows of x; its warps and stages."""

    rows: int
    units: int
    lines: int = 1
    warps: int = 4
    stages: int = 1
    parts: int = 1


def tile_of(weight: Weight, rows: int) -> Tile:
    """For a weight and a number of rows of x: measured on an H100 (``benchmarks/gpu_products.py --tune``)."""
    if rows == 1:
        return Tile(8, 128 if weight.unit == 8 else 32, warps=2)
    tall, lines, programs = (64, 16, 896) if rows <= 16 else (64, 32, 224) if rows <= 32 else (128, 64, 224)
    wanted = programs // (-(-weight.n // tall) * -(-rows // lines))
    parts = max(1, min(8, wanted, weight.k // weight.unit // 64))
    return Tile(tall, 32 if weight.unit == 8 else 16, lines, 4, 3, parts)


def linear(x: Tensor, tensors: Sequence[Tensor], key: str, shape: Sequence[int], bias: Tensor | None) -> Tensor:
    """See :func:`nybble.nn.products.reference`."""
    weight = weight_kept(tensors, key)
    if not x.numel() or weight is None or x.dtype == torch.float64:
        return reference(x, tensors, key, shape, bias)
    return product(x.reshape(-1, weight.k).contiguous(), weight, bias).view(*x.shape[:-1], weight.n)


def product(x: Tensor, weight: Weight, bias: Tensor | None, outer: Tensor | None = None) -> Tensor:
    """``x [m, k] W^T + bias``, x contiguous, m at least 1; with ``outer``, float32 [1], for the scales' outer one."""
    if elsewhere(x):
        with torch.cuda.device(x.device):
            return _product(x, weight, bias, outer)
    return _product(x, weight, bias, outer)


def _product(x: Tensor, weight: Weight, bias: Tensor | None, outer: Tensor | None) -> Tensor:
    rows = x.shape[0]
    made, path = _path(weight, rows, x.dtype)
    if path == "compiled":
        return _few_rows.multiply(made, _aligned(x), weight, bias, outer)
    if outer is not None:
        scales = replace(weight.scales, outer=outer, outer_block=weight.across * weight.n // weight.share)
        weight = replace(weight, scales=scales)
    if path == "expanded":
        return multiply_expanded(x, weight, bias)
    return multiply(x, weight, bias, tile_of(weight, rows))


def how(tensors: Sequence[Tensor], key: str, shape: Sequence[int]) -> tuple[bool, str]:
    """See ``packed_linear.how``."""
    weight = weight_kept(tensors, key)
    if weight is None:
        return False, str(weight_of(qtensor_of(tensors, key)))
    if _path(weight, 1, torch.bfloat16)[1] == "compiled":
        return True, f"CUDA up to {FEW_LOOKED_UP if weight.kind == TABLE else FEW} rows, Triton: packed up to {ROWS}"
    if not weight.whole:
        return True, "Triton, W expanded a part at a time"
    return True, f"Triton, packed up to {ROWS} rows"


def path_of(weight: Weight, rows: int, dtype: torch.dtype) -> str:
    """What multiplies a weight with some rows of x: "compiled", "one row", "tiles" or "expanded"."""
    return _path(weight, rows, dtype)[1]


def _path(weight: Weight, rows: int, dtype: torch.dtype) -> tuple[Any, str]:
    """What is compiled, if that is taken, and the name of the path; found once for so many rows of a dtype."""
    key = (min(rows, ROWS + 1), dtype, COMPILED)
    if key not in weight.kept:
        weight.kept[key] = _find_path(weight, rows, dtype)
    found: tuple[Any, str] = weight.kept[key]
    return found


def _find_path(weight: Weight, rows: int, dtype: torch.dtype) -> tuple[Any, str]:
    if COMPILED and rows <= (FEW_LOOKED_UP if weight.kind == TABLE else FEW) and weight.codes.is_cuda:
        kind = _few_rows.kind_of(weight, dtype, rows)
        made = None if isinstance(kind, str) else _few_rows.library(kind)
        if made is not None:
            return made, "compiled"
    if rows > ROWS or not weight.whole or dtype == torch.float32:
        return None, "expanded"
    return None, "one row" if rows == 1 else "tiles"


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % 16 == 0 else x.clone()


def candidates(weight: Weight, rows: int) -> Iterator[tuple[str, Callable[[Tensor, Weight], Tensor]]]:
    """Ways to multiply in Triton, by name, among which ``benchmarks/gpu_products.py --tune`` looks for the quickest."""
    wide = 128 // (weight.unit // 8)
    if rows == 1:
        tiles = [Tile(n, u, warps=w) for n, u, w in ((8, wide, 2), (4, wide, 1), (8, wide // 2, 2))]
    elif rows <= 64:
        lines = min(64, 1 << max(4, (rows - 1).bit_length()))
        tiles = [Tile(n, u, lines, w, s, p) for n, w, u, s, p in TRIED]
    else:
        tiles = []
    for tile in tiles:
        yield repr(tile), partial(_by, tile)
    for part in (22, 24, 26) if rows > 64 else ():
        yield f"expanded 2^{part}", lambda x, w, part=part: multiply_expanded(x, w, None, 1 << part)  # type: ignore[misc]


def _by(tile: Tile, x: Tensor, weight: Weight) -> Tensor:
    return multiply(x, weight, None, tile)


def multiply(x: Tensor, weight: Weight, bias: Tensor | None, tile: Tile) -> Tensor:
    """``x [m, k] W^T + bias``, W decoded in registers; ``weight.whole``."""
    m, n = x.shape[0], weight.n
    row_units = weight.k // weight.unit
    out = x.new_empty(m, n)
    given = (x, *_pointers(weight), weight.codes if bias is None else bias)
    sizes = (weight.scales.outer_block, weight.across, weight.share, weight.group, row_units)
    meta = _meta(weight) | {"BIAS": bias is not None, "BN": tile.rows, "BU": tile.units, "num_warps": tile.warps}
    grid = -(-n // tile.rows)
    if m == 1:
        kernels.one_row[(grid,)](*given, out, n, *sizes, **meta)
        return out
    steps = -(-row_units // (tile.parts * tile.units))
    parts = -(-row_units // (steps * tile.units))
    to = out if parts == 1 else x.new_empty(parts, m, n, dtype=torch.float32)
    apart = x.view(m, row_units, weight.unit).permute(2, 0, 1).contiguous()
    apart = apart.float() if INTERPRETED else apart  # the interpreter has no products of bfloat16
    kernels.rows_of[grid, -(-m // tile.lines), parts](
        apart,
        *given[1:],
        to,
        m,
        n,
        *sizes,
        steps,
        **meta,
        BM=tile.lines,
        num_stages=1 if weight.kind == TABLE else tile.stages,
    )
    if parts > 1:
        kernels.added[(-(-m * n // 1024),)](to, out, m * n, PARTS=parts, BLOCK=1024)
    return out


def multiply_expanded(x: Tensor, weight: Weight, bias: Tensor | None, part: int = PART) -> Tensor:
    """``x [m, k] W^T + bias`` by way of parts of W in the dtype of x."""
    step = max(1, part // weight.k)
    if step >= weight.n:
        return functional.linear(x, expand(weight, x.dtype, 0, weight.n), bias)
    out = x.new_empty(x.shape[0], weight.n)
    step = -(-weight.n // -(-weight.n // step))
    for start in range(0, weight.n, step):
        stop = min(start + step, weight.n)
        values = expand(weight, x.dtype, start, stop)
        if bias is None:
            torch.mm(x, values.T, out=out[:, start:stop])
        else:
            torch.addmm(bias[start:stop], x, values.T, out=out[:, start:stop])
    return out


def expand(weight: Weight, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """Rows of W: the bits of the reference's."""
    rows, k = stop - start, weight.k
    out = torch.empty(rows, k, dtype=dtype, device=weight.codes.device)
    _, *given = _pointers(weight)
    sizes = (weight.scales.outer_block, weight.across, weight.share, weight.group)
    meta = _meta(weight)
    if weight.whole:
        units = k // weight.unit
        block = max(1, 256 // weight.unit)
        kernels.expanded_units[-(-rows // 8), -(-units // block)](
            _words(weight), *given, out, start, rows, *sizes, units, **meta, BN=8, BU=block
        )
        return out
    for name in ("C", "UNIT", "KIND", "FLIP", "BASE"):
        del meta[name]
    kernels.expanded[-(-rows // 8), -(-k // 128)](
        weight.codes, *given, out, start, rows, k, weight.codes.numel(), *sizes, **meta, BN=8, BK=128
    )
    return out


def _words(weight: Weight) -> Tensor:
    return weight.codes.view(torch.int32)


def _pointers(weight: Weight) -> tuple[Tensor, ...]:
    """Codes, table, scales, their table, outer ones and addend, zeros, offsets; any tensor for what isn't there."""
    scales, none = weight.scales, weight.table
    sides = (scales.table, scales.outer, scales.add, weight.zero, weight.offset)
    codes = _words(weight) if weight.whole else weight.codes
    return codes, weight.table, scales.values, *(none if side is None else side for side in sides)


def _meta(weight: Weight) -> dict[str, Any]:
    return {
        "BITS": weight.bits, "C": weight.unit, "UNIT": 3 if weight.bits == 3 else 1, "KIND": weight.kind,
        "FLIP": weight.flip, "BASE": weight.base, "SCALE": weight.scales.how, "OUTER": weight.scales.outers,
        "ADD": weight.scales.add is not None,
        "ZERO": weight.zero is not None, "OFFSET": weight.offset is not None,
    }  # fmt: skip


def weight_kept(tensors: Sequence[Tensor], key: str) -> Weight | None:
    """The record of a weight, made once; None where the kernels can't read it."""
    return kept_with(tensors, key, _PLAN, lambda: _made(tensors, key))


def _made(tensors: Sequence[Tensor], key: str) -> Weight | None:
    weight = weight_of(qtensor_of(tensors, key))
    return weight if isinstance(weight, Weight) else None


packed_linear.register_kernel("cuda", how)(linear)
