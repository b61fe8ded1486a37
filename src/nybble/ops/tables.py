"""Elementwise, on a grid that is data: code books and decision points that training has found.

``rank(x) = how many thresholds are <= x``, as for the formats with a name (:mod:`nybble.ops.rounding`); values,
thresholds and codes come as tensors. :func:`decision_points` makes the three from a code book and a tie rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.core.errors import FormatError
from nybble.core.shapes import Float32, Integer
from nybble.formats import NumberFormat, get_format
from nybble.ops.checks import check_floats, check_table
from nybble.ops.rounding import grid_table
from nybble.rounding import get_rounding


@torch.library.custom_op(
    "nybble::table_round", mutates_args=(), schema="(Tensor x, Tensor thresholds, Tensor values) -> Tensor"
)
def table_round(
    x: Float32[Tensor, "*shape"], thresholds: Float32[Tensor, " points"], values: Float32[Tensor, " points+1"]
) -> Float32[Tensor, "*shape"]:
    """``values[rank(x)]``; NaN stays NaN.

    Args:
        x: float32, any shape.
        thresholds: float32 [n - 1], ascending.
        values: float32 [n].

    Returns:
        float32, shape of ``x``.
    """
    check_table("table_round", x, thresholds, values)
    x = x.contiguous()
    return torch.where(x.isnan(), x, values[torch.bucketize(x, thresholds, right=True)])


@table_round.register_fake
def _(x: Tensor, thresholds: Tensor, values: Tensor) -> Tensor:
    check_table("table_round", x, thresholds, values)
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "nybble::table_encode", mutates_args=(), schema="(Tensor x, Tensor thresholds, Tensor codes) -> Tensor"
)
def table_encode(
    x: Float32[Tensor, "*shape"], thresholds: Float32[Tensor, " points"], codes: Integer[Tensor, " points+1"]
) -> Integer[Tensor, "*shape"]:
    """``codes[rank(x)]``; NaN takes the last code (who can meet NaN poisons the scale).

    Args:
        x: float32, any shape.
        thresholds: float32 [n - 1], ascending.
        codes: uint8 or int32 [n].

    Returns:
        dtype of ``codes``, shape of ``x``.
    """
    check_table("table_encode", x, thresholds, codes)
    return codes[torch.bucketize(x.contiguous(), thresholds, right=True)]


@table_encode.register_fake
def _(x: Tensor, thresholds: Tensor, codes: Tensor) -> Tensor:
    check_table("table_encode", x, thresholds, codes)
    return codes.new_empty(x.shape)


@torch.library.custom_op("nybble::table_decode", mutates_args=(), schema="(Tensor codes, Tensor values) -> Tensor")
def table_decode(codes: Integer[Tensor, "*shape"], values: Float32[Tensor, " codes"]) -> Float32[Tensor, "*shape"]:
    """``values[code]``.

    Args:
        codes: uint8 or int32, any shape, below ``len(values)``.
        values: float32 [2**bits], one for each code.

    Returns:
        float32, shape of ``codes``.
    """
    return values[codes.contiguous().int()]


@table_decode.register_fake
def _(codes: Tensor, values: Tensor) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


def decision_points(values: Tensor, rounding: str) -> tuple[Tensor, Tensor, Tensor]:
    """Thresholds, ascending values and their codes of a code book, as a registered format has them.

    A code book that holds a format's own values decides as that format does, at every float32. Of two equal values the
    lower code is produced, and -0 is kept apart from +0. Nothing waits for the device.

    Args:
        values: float32 [n], finite, one for each code, in any order.
        rounding: name of a deterministic rounding with a tie rule (not ``native``, which is the format's own).

    Returns:
        float32 [n - 1]; float32 [n]; uint8 [n].
    """
    rule = get_rounding(rounding)
    if rule.tie_up is None:
        raise FormatError(f"rounding={rounding} has no tie rule for a code book of its own; use nearest-even.")
    values = values.detach().float()
    order = torch.sort((~values.signbit()).to(torch.uint8), stable=True).indices  # -0 before +0
    order = order[torch.sort(values[order], stable=True).indices]
    ascending = values[order]
    new = torch.ones_like(order, dtype=torch.bool)
    new[1:] = (ascending[1:] != ascending[:-1]) | (ascending[1:].signbit() != ascending[:-1].signbit())
    place = torch.arange(len(order), device=order.device)
    codes = order[torch.where(new, place, 0).cummax(0).values]
    lower, upper = ascending[:-1].double(), ascending[1:].double()
    lower_even, upper_even = codes[:-1] % 2 == 0, codes[1:] % 2 == 0
    even = torch.where(lower_even == upper_even, upper.abs() < lower.abs(), upper_even)
    middle = lower / 2 + upper / 2
    if rule.float32_middle:
        middle = middle.float().double()
    nearest = middle.float()
    infinity = torch.full_like(nearest, torch.inf)
    above = torch.where(nearest.double() >= middle, nearest, torch.nextafter(nearest, infinity))
    stays = (nearest.double() == middle) & ~rule.tie_up(lower, upper, even)
    thresholds = torch.where(stays, torch.nextafter(above, infinity), above)
    return torch.where(lower == upper, ascending[1:], thresholds), ascending, codes.to(torch.uint8)


@torch.library.custom_op(
    "nybble::around", mutates_args=(), schema="(Tensor y, Tensor values, bool minus) -> (Tensor, Tensor)"
)
def around(
    y: Float32[Tensor, "*shape"], values: Float32[Tensor, " values"], minus: bool
) -> tuple[Float32[Tensor, "*shape"], Float32[Tensor, "*shape"]]:
    """The values on either side of each y, as :func:`neighbours` has them.

    Args:
        y: float32, any shape.
        values: float32, ascending.
        minus: whether zeros take the sign of y.

    Returns:
        two float32 tensors of the shape of ``y``.
    """
    check_floats("around", y, values)
    y = y.contiguous()
    above = torch.bucketize(y, values, right=True)
    # take: a place without dimensions would be read back by values[place], which waits for the GPU
    found = values.take((above - 1).clamp(min=0)), values.take(above.clamp(max=len(values) - 1))
    if minus:
        found = tuple(torch.where(v == 0, torch.copysign(v, y), v) for v in found)  # type: ignore[assignment]
    return torch.where(y.isnan(), y, found[0]), torch.where(y.isnan(), y, found[1])


@around.register_fake
def _(y: Tensor, values: Tensor, minus: bool) -> tuple[Tensor, Tensor]:
    check_floats("around", y, values)
    return y.new_empty(y.shape), y.new_empty(y.shape)


def neighbours(y: Tensor, grid: NumberFormat | str | Tensor) -> tuple[Tensor, Tensor]:
    """The values of a grid on either side of ``y``: ``lower <= y < upper``, exactly; saturates.

    On the largest value and above, both are the largest; below the smallest, both are the smallest. On any other value
    of the grid, ``lower`` is that value and ``upper`` the next one (floor, and floor + 1, of integers). A zero beside a
    negative ``y`` is -0 where the grid has one. NaN gives NaN.

    Args:
        y: float32, any shape.
        grid: a format or its name, or a code book, float32 [n], in any order.

    Returns:
        two float32 tensors of the shape of ``y``, without gradient.

    >>> neighbours(torch.tensor([0.6, 1.0, -7.0, 9.0]), "float4_e2m1fn")
    (tensor([ 0.5000,  1.0000, -6.0000,  6.0000]), tensor([ 1.0000,  1.5000, -6.0000,  6.0000]))
    """
    y = y.detach()
    if isinstance(grid, Tensor):
        values, minus = decision_points(grid, "nearest-even")[1], False
    else:
        fmt = get_format(grid) if isinstance(grid, str) else grid
        values, minus = grid_table(fmt.name, y.device), fmt.negative_zero is not None
    lower, upper = around(y, values, minus)
    return lower, upper
