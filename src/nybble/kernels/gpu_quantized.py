"""Products of two quantized operands on a GPU: x is rounded in one kernel, and multiplied as codes in the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nybble.kernels import _gpu_tiles as tiles
from nybble.kernels import gpu_quantizers as quantizers
from nybble.kernels._gpu import elsewhere
from nybble.kernels._gpu_operands import BF16, BYTE, DOT_DTYPES, FP8, INT4, INT8, Weight, weight_of
from nybble.kernels._gpu_operands import E2M1 as E2M1_CODES
from nybble.kernels._gpu_weights import PLAIN
from nybble.kernels._gpu_weights import Weight as Decoded
from nybble.kernels.gpu_quantizers import E2M1, E4M3, INT, Rows
from nybble.nn.compiled import quantizer_of, static_params
from nybble.nn.float_products import float_linear
from nybble.nn.integer_products import integer_linear, rounded
from nybble.nn.products import packed_linear
from nybble.ops.scaling import pow2_carry
from nybble.qtensor import Inverse, QTensor, dense
from nybble.quantizer import Quantizer
from nybble.rounding import get_rounding
from nybble.scales.absmax import AbsMax
from nybble.scales.minmax import MinMax
from nybble.scales.pow2 import Pow2
from nybble.scales.two_level import TwoLevel

try:
    from nybble.kernels import cuda_products

    DECODED = cuda_products.FEW
except ImportError:  # it needs a later Triton, and is named by whoever loads it
    DECODED = 0
FEW = 64
"""Rows of x up to which a packed weight is decoded inside the product; with scales of blocks, above DECODED."""
_NAMES = {INT8: "INT8", FP8: "FP8", BF16: "bfloat16"}
_E8M0 = "float8_e8m0fnu scale=one"
_NVFP4 = "float8_e4m3fn floor=normal"


@dataclass(frozen=True)
class Rounder:
    """How activations are rounded: the tensor cores that their codes fit, and what the quantizing kernel is told."""

    cores: int
    kind: int
    low: float
    high: float
    target: float = 0.0
    measured: bool = False
    asymmetric: bool = False
    inside: bool = False
    group: int = 0
    carry: int | None = None
    emax: int = 0


@lru_cache(maxsize=4096)
def rounder_of(line: str) -> Rounder | None:
    """Of a quantizer; None where no kernel rounds so."""
    quantizer = quantizer_of(line)
    fmt = quantizer.format
    kind = {"float8_e4m3fn": E4M3, "float4_e2m1fn": E2M1}.get(fmt.name, INT if fmt.is_integer else None)
    if kind is None or fmt.bits > 8:
        return None
    if str(quantizer.granularity).startswith("group="):
        return _of_blocks(quantizer, kind)
    scale = quantizer.scale
    measured = str(quantizer.granularity) == "token" and quantizer.scale_format == "float32" and not quantizer.static
    target = (scale.target if isinstance(scale, AbsMax) else 0) or fmt.absmax
    return Rounder(
        INT8 if kind == INT else FP8,
        kind,
        fmt.min,
        fmt.max,
        target,
        measured and isinstance(scale, AbsMax | MinMax),
        isinstance(scale, MinMax),
        get_rounding(quantizer.rounding).zero_inside,
    )


def _of_blocks(quantizer: Quantizer, kind: int) -> Rounder | None:
    fmt, scale, stored = quantizer.format, quantizer.scale, str(quantizer.scale_format)
    size = str(quantizer.granularity).partition("=")[2]
    group = int(size) if size.isdecimal() else 0
    if not group or group & (group - 1) or group > 1024:
        return None
    if isinstance(scale, Pow2) and stored == _E8M0 and fmt.absmax >= 2:
        emax = int(fmt.absmax).bit_length() - 1
        carry = pow2_carry(fmt, scale.mode) if scale.of_maximum else None
        return Rounder(BF16, kind, fmt.min, fmt.max, group=group, carry=carry, emax=emax)
    nested = isinstance(scale, AbsMax) and not scale.target and stored == _NVFP4
    divided = isinstance(scale, TwoLevel) and scale.inner == 448 and stored == "float8_e4m3fn"
    return Rounder(BF16, kind, fmt.min, fmt.max, group=group) if (nested or divided) and kind != INT else None


def rows_of(x: Tensor, parts: Sequence[Tensor], names: str, line: str, dot: int, planes: bool, group: int) -> Rows:
    """``x`` [rows, columns] rounded, as a product on some tensor cores reads it.

    Args:
        x: float32, bfloat16 or float16, contiguous.
        parts: as :func:`nybble.nn.integer_products.reference` has them.
        names: as there.
        line: as there, of a quantizer that :func:`rounder_of` knows.
        dot: the tensor cores.
        planes: even and odd columns apart.
        group: columns whose codes are added up; 0: none are.
    """
    rule = rounder_of(line)
    assert rule is not None
    params = _static(line, parts, names)
    if rule.cores == BF16:
        return _rows_of_blocks(x, rule, line, params, planes=planes)
    given = None if rule.measured else _given(x, line, params)
    return quantizers.tokens(
        x, rule.kind, rule.low, rule.high, target=rule.target, given=given,
        asymmetric=rule.asymmetric and rule.measured, inside=rule.inside, dtype=DOT_DTYPES[dot], planes=planes,
        group=group,
    )  # fmt: skip


def _static(line: str, parts: Sequence[Tensor], names: str) -> Any:
    """Parameters of a static quantizer; None of one that measures."""
    return static_params(quantizer_of(line), dict(zip(names.split(), parts, strict=True))) if parts else None


def _rows_of_blocks(
    x: Tensor, rule: Rounder, line: str, params: Any, *, times: Tensor | None = None, planes: bool = False
) -> Rows:
    divisor = None
    scale = quantizer_of(line).scale
    if isinstance(scale, TwoLevel):
        known = None if params is None else params.scale
        divisor = known.divisor if isinstance(known, Inverse) else scale.divisor(x.float(), quantizer_of(line).format)
        divisor = divisor.float().reshape(1)
    return quantizers.blocks(
        x, rule.kind, rule.low, rule.high, group=rule.group, carry=rule.carry, emax=rule.emax, divisor=divisor,
        times=times, planes=planes,
    )  # fmt: skip


def _given(x: Tensor, line: str, params: Any) -> tuple[Tensor, Tensor | None]:
    """Scales of x and its zero points, float32, one a row or one for all."""
    params = quantizer_of(line).fit(x) if params is None else params
    flat = [_flat(params.scale, x), None if params.zero_point is None else _flat(params.zero_point, x)]
    assert flat[0] is not None
    return flat[0], flat[1]


def _flat(value: Any, like: Tensor) -> Tensor:
    if value is None:
        return torch.ones(1, device=like.device)
    assert isinstance(value, Tensor | QTensor)
    return dense(value).float().reshape(-1).contiguous()


class Way(NamedTuple):
    """How a product goes.

    Attributes:
        dot: the tensor cores.
        planes: whether even and odd columns of x are apart, and a packed weight is decoded inside.
        group: columns of x whose codes are added up; 0: none are.
        promote: columns that FP8 units add up by themselves.
    """

    dot: int
    planes: bool
    group: int
    promote: int


def cores_for(rule: Rounder, weight: Weight) -> int:
    """The tensor cores for a product of rounded x and a weight."""
    plain = weight.inner is None and weight.group >= 64
    if rule.cores == BF16:
        return BF16
    doubled = weight.code == E2M1_CODES and plain and rule.high <= 127
    if rule.cores == INT8:
        return INT8 if (weight.whole and plain) or doubled else BF16
    return FP8 if weight.fp8 and weight.zero is None and (weight.inner is not None or plain) else BF16


def route(weight: Weight | str, line: str, rows: int) -> Way | str:
    """How some rows of x go; or why there is no way."""
    if isinstance(weight, str):
        return weight
    key = (line, rows <= FEW, tiles.USUAL)
    if key not in weight.routes:
        weight.routes[key] = _route(weight, line, rows)
    found: Way | str = weight.routes[key]
    return found


def _route(weight: Weight, line: str, rows: int) -> Way | str:
    rule = rounder_of(line)
    if rule is None:
        return f"activations by {line}"
    few = rows <= FEW and weight.code != BYTE
    dot = cores_for(rule, weight)
    planes = few or (weight.code == INT4 and dot == INT8 and weight.scale.shape[1] == 1)  # no slower for many rows
    if (rule.group and weight.k % rule.group) or (dot == BF16 and rule.cores == INT8 and rule.high > 127):
        return f"activations by {line} of {weight.k} columns"
    if rule.asymmetric and not (dot == INT8 and weight.whole):
        return "zero points of activations beside weights that are no integers"
    group = weight.group if weight.zero is not None else 0
    odd = group and group != weight.k and group & (group - 1)
    if odd or not tiles.fits(weight, dot, planes) or weight.k > 65536:
        return f"groups of {weight.group} columns, or zero points, on {_NAMES[dot]} cores"
    exact = rule.kind == E2M1 and weight.code == E2M1_CODES and weight.inner is None
    return Way(dot, planes, group, tiles.EXACT if exact else tiles.USUAL)


def decoded(tensors: Sequence[Tensor], key: str, rule: Rounder | None, rows: int) -> Decoded | None:
    """A weight by which a few rows in bfloat16, exact but for one scale, are multiplied as any others; or None."""
    if rule is None or rule.cores != BF16 or not 0 < rows <= DECODED:
        return None
    weight = cuda_products.weight_kept(tensors, key)
    if weight is None or not weight.whole or weight.k % rule.group:
        return None
    scales = weight.scales
    return weight if rule.emax or (scales.how != PLAIN and scales.outers < 2 and scales.add is None) else None


def _by_blocks(x: Tensor, weight: Decoded, bias: Tensor | None, rule: Rounder, line: str, params: Any) -> Tensor:
    """The product of few rows: their own scale, where they have one, goes to that of the weight's scales."""
    if rule.emax:
        return cuda_products.product(_rows_of_blocks(x, rule, line, params).codes, weight, bias)
    found = _rows_of_blocks(x, rule, line, params, times=weight.scales.outer)
    return cuda_products.product(found.codes, weight, bias, found.scale)


def linear(
    x: Tensor,
    tensors: Sequence[Tensor],
    key: str,
    shape: Sequence[int],
    bias: Tensor | None,
    parts: Sequence[Tensor],
    names: str,
    line: str,
) -> Tensor:
    """See :func:`nybble.nn.integer_products.reference`."""
    n, k = shape
    rows, rule = x.numel() // k, rounder_of(line)
    if elsewhere(x):
        with torch.cuda.device(x.device):
            return linear(x, tensors, key, shape, bias, parts, names, line)
    brain = x.dtype == torch.bfloat16 and (bias is None or bias.dtype == x.dtype)
    few = decoded(tensors, key, rule, rows) if brain else None
    if few is not None and rule is not None:
        params = _static(line, parts, names)
        return _by_blocks(x.reshape(rows, k).contiguous(), few, bias, rule, line, params).view(*x.shape[:-1], n)
    weight = weight_of(tensors, key)
    way = route(weight, line, rows)
    if isinstance(way, str) or isinstance(weight, str) or not rows:
        return packed_linear(rounded(x, parts, names, line), tensors, key, shape, bias)
    found = rows_of(x.reshape(rows, k).contiguous(), parts, names, line, way.dot, way.planes, way.group)
    out = x.new_empty((rows, n))
    return tiles.product(found, weight, way.dot, way.promote, bias, out).view(*x.shape[:-1], n)


def how(
    tensors: Sequence[Tensor], key: str, shape: Sequence[int], parts: Sequence[Tensor], names: str, line: str
) -> tuple[bool, str]:
    """See ``integer_linear.how``."""
    if decoded(tensors, key, rounder_of(line), 1) is not None:
        return cuda_products.how(tensors, key, shape)
    way = route(weight_of(tensors, key), line, 1)
    return (False, way) if isinstance(way, str) else (True, f"Triton, {_NAMES[way.dot]} tensor cores")


for _op in (integer_linear, float_linear):
    _op.register_kernel("cuda", how)(linear)
