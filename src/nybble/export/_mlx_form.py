"""How MLX would pack a tensor, if it can without a change of any value; headers tell all but what scales hold.

MLX knows four modes (mlx 0.32, ``mx.quantize``): integers over scales and biases in groups of 32, 64 or 128 columns,
and MXFP4, MXFP8 and NVFP4. Into the first goes every format whose values are evenly spaced, signed or not, and every
scale that such groups can repeat.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from nybble.formats import NumberFormat
from nybble.models.sources.layouts._ct_args import E2M1, E4M3, CannotError, in_words, is_mx, strategy
from nybble.qtensor import Factored, Inverse, QTensor
from nybble.qtensor.block import BlockQTensor

BITS = (1, 2, 3, 4, 5, 6, 8)
GROUPS = (128, 64, 32)
_ANY = "uint4 group=64 scale=minmax(offset=true)"


@dataclass(frozen=True)
class Ladder:
    """Evenly spaced values: ``low + step * rung``.

    Attributes:
        low, step: of the values. bits: that number the rungs. rungs: code -> rung.
    """

    low: float
    step: float
    bits: int
    rungs: tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """How a tensor is packed.

    Attributes:
        mode: affine, mxfp4, mxfp8 or nvfp4. bits: of a code. group: columns that share a scale.
        each: columns and rows that share one in the tensor itself; 0 for all of them.
        ladder: of the format, where the mode is affine. outer: whether its scales have a scale (NVFP4).
    """

    mode: str
    bits: int
    group: int
    each: tuple[int, int]
    ladder: Ladder | None = None
    outer: bool = False

    @property
    def said(self) -> dict[str, int | str | bool]:
        """As config.json says it."""
        return {"group_size": self.group, "bits": self.bits, "mode": self.mode}


def ladder_of(fmt: NumberFormat) -> Ladder | None:
    """The evenly spaced values of a format; None of one that has others, or more than 256.

    >>> from nybble.formats import get_format
    >>> ladder_of(get_format("int2_full"))
    Ladder(low=-2.0, step=1.0, bits=2, rungs=(2, 3, 0, 1))
    """
    if fmt.bits > 8:
        return None
    values = [float(value) for value in fmt.values]
    known = sorted({value for value in values if math.isfinite(value)})
    step = known[1] - known[0] if len(known) > 1 else 1.0
    if len(known) < len(set(values)) or any(b - a != step for a, b in pairwise(known)):
        return None
    bits = next((bits for bits in BITS if len(known) <= 1 << bits), None)
    if bits is None:
        return None
    low = known[0]
    return Ladder(low, step, bits, tuple(round((value - low) / step) for value in values))


def form_of(tensor: QTensor, experts: bool = False) -> Form:
    """How MLX packs a matrix [out, in], which may be on the meta device.

    Args:
        tensor: the matrix.
        experts: whether it is one of a layer's experts, which may have a global scale each.

    Raises:
        CannotError: it has no such packing.
    """
    came = in_words(tensor)
    if not isinstance(tensor, BlockQTensor):
        raise CannotError(came, f"one format with a scale a group, {_ANY}")
    rows, columns = tensor.shape
    if columns % 32 and (tensor.format.name != E2M1 or columns % 16):
        why = f"{columns} columns are no multiple of 32"
        raise CannotError(came, "such layers in float (--ignore NAME)", why)
    if tensor.params.grid is not None:
        raise CannotError(came, f"{tensor.format.name} as it is", "its code book was learned")
    if isinstance(tensor.params.scale, Factored | Inverse):
        raise CannotError(came, nearest(tensor), "its scale is made of factors, or kept as a reciprocal")
    how = strategy(tensor.granularity, rows, columns, came)
    wide, high = (how.group_size or 0, 1) if how.structure is None else (how.structure[1], how.structure[0])
    each = (wide, rows if how.name == "tensor" else high)
    plain = tensor.params.offset is None and tensor.params.zero_point is None
    found = _float_mode(tensor, each, experts) if plain else None
    if found is not None:
        return found
    ladder = ladder_of(tensor.format)
    group = next((g for g in GROUPS if (wide or columns) % g == 0), None)
    if ladder is None or group is None:
        why = "" if ladder is None else f"{wide} columns share a scale, and groups have 32, 64 or 128"
        raise CannotError(came, nearest(tensor), why)
    return Form("affine", ladder.bits, group, each, ladder)


def _float_mode(tensor: BlockQTensor, each: tuple[int, int], experts: bool) -> Form | None:
    """MXFP4, MXFP8 or NVFP4, whose scales are bytes."""
    name, width = tensor.format.name, each[0] or tensor.shape[1]
    if name in (E2M1, E4M3) and is_mx(tensor) and width % 32 == 0:
        return Form("mxfp4" if name == E2M1 else "mxfp8", tensor.format.bits, 32, each)
    scale = tensor.params.scale
    if name != E2M1 or not isinstance(scale, BlockQTensor) or scale.format.name != E4M3 or width % 16:
        return None
    outer = scale.params.scale
    if scale.params.zero_point is not None or scale.params.offset is not None or isinstance(outer, Factored | QTensor):
        return None
    value = outer.divisor if isinstance(outer, Inverse) else outer
    if value is not None and value.numel() != 1 and not experts:
        return None
    return Form("nvfp4", 4, 16, each, outer=outer is not None)


def nearest(tensor: BlockQTensor) -> str:
    """A line of about as many bits, whose groups divide the columns; a multiple of 32 of them."""
    fmt, columns = tensor.format, tensor.shape[1]
    if not fmt.is_integer and ladder_of(fmt) is None:
        if fmt.bits == 4 and fmt.exponent_bits:
            return "mxfp4, or nvfp4 with --target mlx"
        if fmt.bits == 8 and fmt.exponent_bits:
            return "mxfp8"
    word, _, size = str(tensor.granularity).split()[0].partition("=")
    wanted = int(size) if word == "group" else 64
    sizes = [g for g in GROUPS if columns % g == 0]
    group = min(sizes, key=lambda g: (abs(g - wanted), g))
    bits = next((b for b in BITS if b >= fmt.bits), 8)
    params = tensor.params
    if fmt.is_integer and bits > 1 and params.zero_point is None and params.offset is None:
        return f"int{bits} group={group}"
    return f"uint{bits} group={group} scale=minmax(offset=true)"


def is_power_of_two(value: float) -> bool:
    """Whether a number's reciprocal, and products with it, are exact."""
    return value > 0 and math.frexp(value)[0] == 0.5


def repeated(values: torch.Tensor, form: Form, shape: tuple[int, int]) -> torch.Tensor:
    """Scales as MLX has them, one for each of its groups: [out, in / group].

    Args:
        values: one for each block of the tensor, in order.
        form: how it is packed.
        shape: [out, in] of the tensor.
    """
    rows, columns = shape
    wide, high = form.each[0] or columns, form.each[1]
    flat = values.reshape(math.ceil(rows / high), -1)
    if flat.shape[1] != columns // wide:
        raise AssertionError(f"{list(values.shape)} scales for {list(shape)} in {form}")
    found = flat.repeat_interleave(wide // form.group, 1)
    return (found if high == 1 else found.repeat_interleave(high, 0)[:rows]).contiguous()
