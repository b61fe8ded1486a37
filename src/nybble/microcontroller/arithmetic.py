"""Sixteen-bit arithmetic with one rounding after each operation, and products in the order in which a kernel adds.

torch calculates one elementwise operation of float16 or bfloat16 in float32 and rounds it to nearest even. A product or
a sum of two such numbers that was rounded to 24 bits first rounds to 11 or 8 as the exact one does (24 >= 2 * 11 + 2;
Figueroa 1995), so elementwise operations of torch are those of IEEE 754 units.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.core.errors import UsageError

TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
WIDEST = 32


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """What a unit calculates with.

    Attributes:
        dtype: of all numbers, accumulators among them.
        lanes: of a vector; 1 is the scalar kernel. Where both operands of a product have their rows along the sum, k
            goes to lane ``k % lanes``, what is left over to a scalar first, and the lanes are added to that at the end.
            Everywhere else lanes hold different outputs, and don't show.
        fused: whether multiply-adds round once, after the sum (contraction), or after the product as well.

    Raises:
        UsageError: a type, or a number of lanes, that there is not.
    """

    dtype: torch.dtype = torch.float16
    lanes: int = 1
    fused: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in TYPES.values():
            raise UsageError(f"no arithmetic in {self.dtype}; there is {', '.join(TYPES)}.")
        if not 1 <= self.lanes <= WIDEST or self.lanes & (self.lanes - 1):
            raise UsageError(f"lanes is {self.lanes}; a vector has 1, 2, 4 and so on up to {WIDEST}.")

    def multiply_add(self, total: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """``total + a * b``, elementwise with broadcasting; all of ``dtype``."""
        return _fused(total, a, b) if self.fused else total + a * b

    def product(self, a: Tensor, b: Tensor, *, transposed: bool) -> Tensor:
        """The matrix product, added up as a kernel does it.

        Args:
            a: ``[..., N, K]``.
            b: ``[..., K, M]``; ``[..., M, K]`` where it is ``transposed``.
            transposed: whether rows of ``b`` run along the sum, as those of ``a`` do.

        Returns:
            ``[..., N, M]``.
        """
        if transposed and self.lanes > 1:
            return self._by_lanes(a, b)
        b = b.transpose(-1, -2) if transposed else b
        total = a.new_zeros(_outputs(a, b.transpose(-1, -2)))
        for k in range(a.shape[-1]):
            total = self.multiply_add(total, a[..., :, k, None], b[..., None, k, :])
        return total

    def _by_lanes(self, a: Tensor, b: Tensor) -> Tensor:
        shape = _outputs(a, b)
        whole = a.shape[-1] // self.lanes * self.lanes
        lanes, left = a.new_zeros((*shape, self.lanes)), a.new_zeros(shape)
        for k in range(0, whole, self.lanes):
            along = slice(k, k + self.lanes)
            lanes = self.multiply_add(lanes, a[..., :, None, along], b[..., None, :, along])
        for k in range(whole, a.shape[-1]):
            left = self.multiply_add(left, a[..., :, None, k], b[..., None, :, k])
        total = lanes[..., 0]
        for lane in range(1, self.lanes):
            total = total + lanes[..., lane]
        return left + total

    def sum(self, x: Tensor) -> Tensor:
        """Over the last dimension, one after another from zero: ``[..., K]`` -> ``[...]``."""
        total = x.new_zeros(x.shape[:-1])
        for k in range(x.shape[-1]):
            total = total + x[..., k]
        return total

    def over(self, total: Tensor, count: int) -> Tensor:
        """``total / count``, divided in float32 and rounded."""
        return (total.float() / torch.tensor(float(count), dtype=torch.float32)).to(self.dtype)

    def constant(self, value: float) -> Tensor:
        """A number that C has as a float constant, in ``dtype``: ``[]``."""
        return torch.tensor(value, dtype=torch.float32).to(self.dtype)


def _outputs(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """The shape of a product of ``[..., N, K]`` and ``[..., M, K]``; what is in front is the same, or in one alone."""
    return (*max(a.shape[:-2], b.shape[:-2], key=len), a.shape[-2], b.shape[-2])


def _fused(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``round(c + a * b)``, rounded once: float64 holds the product, and rounding to odd lets a second one do no harm.

    Source: Boldo, Melquiond, "Emulation of a FMA and correctly rounded sums", IEEE TC 2008.
    """
    product, wide = a.double() * b.double(), c.double()
    total = product + wide
    of_wide = total - product
    lost = (product - (total - of_wide)) + (wide - of_wide)
    bits = total.contiguous().view(torch.int64)
    outward = (lost > 0) == (total > 0)
    moved = torch.where(outward, bits + 1, bits - 1).view(torch.float64)
    odd = torch.where((lost != 0) & torch.isfinite(lost) & (bits & 1 == 0), moved, total)
    return odd.float() if c.dtype == torch.float32 else _to_odd(odd).to(c.dtype)


def _to_odd(x: Tensor) -> Tensor:
    """float64 -> float32, to the neighbour whose last bit is 1 unless x is a float32."""
    near = x.float()
    bits = near.view(torch.int32)
    outward = (x > near.double()) == (near > 0)
    moved = torch.where(outward, bits + 1, bits - 1).view(torch.float32)
    inexact = (near.double() != x) & torch.isfinite(near) & (near != 0) & (bits & 1 == 0)
    return torch.where(inexact, moved, near)


# exp and log as a few float32 operations, since no two libraries agree on the last bit of theirs. Coefficients are
# Taylor's; with |r| <= ln(2)/2 and |t| <= 0.172 what is left out is below half a unit of float32.
_LOG2E, _LN2_HIGH, _LN2_LOW = (float.fromhex(text) for text in ("0x1.715476p+0", "0x1.62e4p-1", "0x1.7f7d1cp-20"))
_EXP = tuple(
    float.fromhex(text)
    for text in ("0x1.a01a02p-13", "0x1.6c16c2p-10", "0x1.111112p-7", "0x1.555556p-5", "0x1.555556p-3", "0x1p-1")
)
_LOG = tuple(float.fromhex(text) for text in ("0x1.c71c72p-4", "0x1.24924ap-3", "0x1.99999ap-3", "0x1.555556p-2"))
_ROOT2 = float.fromhex("0x1.6a09e6p+0")
LOW, HIGH = -87.0, 88.0


def exp32(x: Tensor) -> Tensor:
    """``exp`` in float32, between exp(-87) and exp(88), within 2 units in the last place."""
    x = x.clamp(LOW, HIGH)
    n = torch.floor(x * _LOG2E + 0.5)
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = torch.full_like(r, _EXP[0])
    for coefficient in _EXP[1:]:
        p = p * r + coefficient
    p = p * (r * r) + r
    p = p + 1.0
    return p * ((n.to(torch.int32) + 127) << 23).view(torch.float32)


def log32(x: Tensor) -> Tensor:
    """Natural logarithm in float32 of normal positive numbers."""
    bits = x.contiguous().view(torch.int32)
    exponent = (bits >> 23) - 127
    m = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32)
    high = m > _ROOT2
    m, n = torch.where(high, m * 0.5, m), (exponent + high.to(torch.int32)).float()
    t = (m - 1.0) / (m + 1.0)
    square = t * t
    p = torch.full_like(t, _LOG[0])
    for coefficient in _LOG[1:]:
        p = p * square + coefficient
    p = (p * square) * t + t
    return n * _LN2_HIGH + (n * _LN2_LOW + (p + p))
