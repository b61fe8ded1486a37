"""What elementwise operators take: a wrong dtype, shape or device is an error before they run, not another number."""

from __future__ import annotations

from torch import Tensor, bfloat16, float16, float32, float64

from nybble.core.errors import UsageError

FLOATS = frozenset({float32, bfloat16, float16, float64})
NARROW = ("float32", "bfloat16", "float16")
"""What scales are rounded to."""


def check_floats(name: str, x: Tensor, *beside: Tensor) -> None:
    """Whether ``x`` is of a float's dtype, and what comes beside it is where it is.

    Raises:
        UsageError: names the operator, and what came.
    """
    if x.dtype not in FLOATS:
        raise UsageError(f"{name}: x in {x.dtype}; it takes float32, bfloat16, float16 and float64.")
    for other in beside:
        if other.device != x.device:
            raise UsageError(f"{name}: {list(x.shape)} on {x.device} beside a tensor on {other.device}; move one.")


def check_table(name: str, x: Tensor, thresholds: Tensor, found: Tensor) -> None:
    """The arguments of :func:`nybble.ops.tables.table_round`, and of what is like it.

    Raises:
        UsageError: names the operator, and what came.
    """
    check_floats(name, x, thresholds, found)
    if thresholds.dim() != 1 or found.shape != (len(thresholds) + 1,):
        raise UsageError(
            f"{name}: thresholds {list(thresholds.shape)} and a table {list(found.shape)}; the table is longer by one."
        )


def check_blocks(name: str, blocks: Tensor, scale: Tensor | None = None) -> None:
    """Whether ``blocks`` is a matrix of floats, and a scale broadcasts to it.

    Raises:
        UsageError: names the operator, and what came.
    """
    check_floats(name, blocks, *(() if scale is None else (scale,)))
    if blocks.dim() != 2:
        raise UsageError(f"{name}: {list(blocks.shape)} is not [blocks, elements].")
    if scale is None:
        return
    fits = scale.dim() == 2 and all(a in (1, b) for a, b in zip(scale.shape, blocks.shape, strict=True))
    if not fits or scale.dtype not in FLOATS:
        count, size = blocks.shape
        raise UsageError(
            f"{name}: a scale {list(scale.shape)} in {scale.dtype} for blocks {[count, size]}; it is a float's, "
            f"{[count, 1]}, {[1, size]} or {[count, size]}."
        )


def check_dynamic(name: str, blocks: Tensor, target: float, pow2: str, scale_dtype: str) -> None:
    """The arguments of :func:`nybble.ops.blocks.dynamic_round` beside a format and a rounding.

    Raises:
        UsageError: names the operator, and what came.
    """
    check_blocks(name, blocks)
    if not pow2 and not target > 0:
        raise UsageError(f"{name}: target={target}, which nothing positive is mapped to.")
    if scale_dtype not in NARROW:
        raise UsageError(f"{name}: a scale in {scale_dtype}; it is one of {', '.join(NARROW)}.")
