"""What GPU products of two quantized operands need to know of each: in which numbers both can be multiplied exactly."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from nybble.formats import NumberFormat
from nybble.formats.integer import IntFormat
from nybble.granularity import make_granularity
from nybble.kernels._gpu import Launches
from nybble.kernels._places import kept_with
from nybble.nn.products import qtensor_of
from nybble.ops.rounding import decode
from nybble.qtensor import Inverse, QTensor, dense
from nybble.qtensor.block import BlockQTensor

BYTE, INT4, E2M1 = 0, 1, 2
"""How codes lie in bytes: one each (int8 or E4M3), or two of INT4 (biased ones too) or E2M1."""
INT8, FP8, BF16 = 0, 1, 2
"""The tensor cores' numbers."""
DOT_DTYPES = {INT8: torch.int8, FP8: torch.float8_e4m3fn, BF16: torch.bfloat16}
_LIFT = 64.0
"""E2M1's largest, 6, times this is near E4M3's largest, 448: the shifts that E4M3 can hold start there."""
_DEEPEST = 2.0**-14
"""The smallest ratio of scales by which E2M1 (times 64) is still exact in E4M3."""
_PLAN = "_nybble_gpu_operand"


@dataclass(frozen=True)
class Weight:
    """A matrix [n, k] of 4 or 8 bits: ``(code - zero) * inner * scale``.

    Attributes:
        codes: uint8 [n, bytes of a row].
        code: :data:`BYTE`, :data:`INT4` or :data:`E2M1`.
        flip: what is added to unsigned codes (-8, -128), in the zero points already.
        whole: whether codes are integers.
        n, k: the shape.
        scale: float32 [n, groups]; groups is 1 where ``inner`` is there.
        zero: int32 [n, groups], or None.
        sums: int32 [n, groups], of ``code - zero``; where codes are integers.
        inner: float32 [n, blocks], by which codes are multiplied exactly in bfloat16 (block scales without what is
            shared), or None.
        fp8: whether ``64 * value * inner`` is exact in E4M3.
    """

    codes: Tensor
    code: int
    flip: int
    whole: bool
    n: int
    k: int
    scale: Tensor
    zero: Tensor | None
    sums: Tensor | None
    inner: Tensor | None
    fp8: bool

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.k // self.scale.shape[1]

    def on(self, dot: int) -> tuple[Tensor, Tensor | None, float]:
        """Scales behind the product, and what codes are multiplied with before it, exactly, on some tensor cores."""
        if dot == FP8 and self.inner is not None:
            return (*self._shifted, 1.0)
        if dot == INT8 and self.code == E2M1:
            return self._halved, None, 2.0
        return self.scale, self.inner, 1.0

    @cached_property
    def _shifted(self) -> tuple[Tensor, Tensor]:
        """Block scales as powers of two up to 64, and the rest a row."""
        assert self.inner is not None
        top = self.inner.amax(1, keepdim=True)
        return (self.scale * top / _LIFT).contiguous(), (self.inner / top * _LIFT).contiguous()

    @cached_property
    def _halved(self) -> Tensor:
        """Scales of twice E2M1's values, which are whole."""
        return self.scale / 2

    @cached_property
    def launches(self) -> Launches:
        """What Triton compiled for products with it."""
        return Launches()

    @cached_property
    def routes(self) -> dict[Hashable, Any]:
        """How products with it go, as :mod:`nybble.kernels.gpu_quantized` found."""
        return {}

    @property
    def block(self) -> int:
        """Columns that share an inner scale; 0 without."""
        return 0 if self.inner is None else self.k // self.inner.shape[1]


def weight_of(tensors: Sequence[Tensor], key: str) -> Weight | str:
    """The plan of a weight, or why there is none; kept with its codes as long as the same tensors come with them.

    Making it waits for the device: the first call of a layer is not one to capture in a graph.
    """
    return kept_with(tensors, key, _PLAN, lambda: plan(qtensor_of(tensors, key)))


def plan(qtensor: QTensor) -> Weight | str:
    """See :func:`weight_of`."""
    if not isinstance(qtensor, BlockQTensor) or qtensor.layout != "dense" or len(qtensor.shape) != 2:
        return f"weights of the kind {qtensor.kind}"
    fmt, (n, k), params = qtensor.format, qtensor.shape, qtensor.params
    code = _code(fmt)
    if code is None or params.grid is not None or params.offset is not None or params.thresholds is not None:
        return f"codes in {fmt.name}, or offsets"
    groups = _groups(str(qtensor.granularity), n, k)
    if groups is None or not n * k or k * fmt.bits % 8 or isinstance(params.zero_point, Tensor):
        return f"scales by {qtensor.granularity} of {k} columns"
    found = _scales(qtensor, groups)
    if found is None:
        return f"scales in {getattr(getattr(params.scale, 'format', None), 'name', type(params.scale).__name__)}"
    scale, inner = found
    flip = -(1 << fmt.bits - 1) if isinstance(fmt, IntFormat) and not fmt.is_signed else 0
    zero = None
    if params.zero_point is not None or flip:
        zero = torch.full((n, groups), float(flip), device=qtensor.codes.device)
        if params.zero_point is not None:
            zero = zero + _spread(dense(params.zero_point), n, groups)
        zero = zero.int().contiguous()
    codes = qtensor.codes.detach().contiguous().view(n, -1)
    sums = _sums(qtensor, groups, zero, flip) if fmt.is_integer else None
    exact = fmt.name != "float8_e4m3fn" if inner is not None else True
    fp8 = exact and (inner is None or _shifts(inner)) and (fmt.bits == 4 or not fmt.is_integer)
    return Weight(codes, code, flip, fmt.is_integer, n, k, scale, zero, sums, inner, fp8)


def _code(fmt: NumberFormat) -> int | None:
    if isinstance(fmt, IntFormat):
        return {4: INT4, 8: BYTE}.get(fmt.bits)
    return {"float4_e2m1fn": E2M1, "float8_e4m3fn": BYTE}.get(fmt.name)


@lru_cache(maxsize=4096)
def _groups(granularity: str, n: int, k: int) -> int | None:
    """Scales of a row, where they lie row by row; None elsewhere."""
    shape = make_granularity(granularity).scale_shape((n, k))
    name, _, size = granularity.partition("=")
    if name in ("channel", "token", "tensor"):
        return 1
    regular = name == "group" and size.isdecimal() and k % int(size) == 0
    return math.prod(shape) // n if regular else None


def _spread(values: Tensor, n: int, groups: int) -> Tensor:
    flat = values.detach().float().reshape(-1)
    return (flat.expand(n * groups) if flat.numel() == 1 else flat).view(n, groups)


def _scales(qtensor: BlockQTensor, groups: int) -> tuple[Tensor, Tensor | None] | None:
    """What is multiplied behind the product, and exactly before it."""
    n, scale = qtensor.shape[0], qtensor.params.scale
    device = qtensor.codes.device
    if scale is None:
        return torch.ones(n, 1, device=device).expand(n, groups).contiguous(), None
    if isinstance(scale, Tensor):
        return _spread(scale, n, groups).contiguous(), None
    if not isinstance(scale, BlockQTensor) or scale.layout != "dense" or scale.format.bits > 8:
        return None
    outer, name = scale.params.scale, scale.format.name
    if scale.params.zero_point is not None or scale.params.offset is not None or scale.params.grid is not None:
        return None
    inner = decode(scale.unpacked(), name).reshape(n, groups).contiguous()
    if outer is None:
        shared = torch.ones(n, 1, device=device)
    elif isinstance(outer, Inverse):
        shared = 1.0 / _spread(outer.divisor, n, 1)
    elif isinstance(outer, Tensor | QTensor):
        flat = dense(outer).reshape(-1)
        if flat.numel() not in (1, n) or (flat.numel() == n and str(scale.granularity) == "tensor" and n > 1):
            return None
        shared = _spread(flat, n, 1)
    else:
        return None
    return shared.contiguous(), inner


def _sums(qtensor: BlockQTensor, groups: int, zero: Tensor | None, flip: int) -> Tensor:
    n, k = qtensor.shape
    values = decode(qtensor.unpacked(), qtensor.format.name).view(n, groups, k // groups).sum(2)
    found: Tensor = values.int() + flip * (k // groups)
    return (found if zero is None else found - zero * (k // groups)).contiguous()


def _shifts(inner: Tensor) -> bool:
    """Whether block scales are powers of two that E4M3's exponents can take up, under one number a row."""
    ratio = inner / inner.amax(1, keepdim=True)
    mantissa, _ = torch.frexp(ratio)
    return bool(((mantissa == 0.5) & (ratio >= _DEEPEST) & inner.isfinite()).all())
