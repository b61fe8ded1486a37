"""Ratios of scales as m / 2^e: what multiplies sums on their way to the next codes, without a float.

Source: HAWQ-V3, section 3.1 and the released code; gemmlowp's fixed-point multiplication is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nybble.core.errors import DataError, UsageError

MANTISSA = 31
"""Bits of m."""
LIMIT = 2**31
"""What is multiplied is below this in magnitude, so that the product has 62 bits."""
_SHIFT = 62
"""From the next on, any product is below half."""
Ties = Literal["half-even", "half-up"]


@dataclass(frozen=True, kw_only=True)
class Dyadic:
    """``mantissa / 2^exponent``, with ``2^30 <= mantissa < 2^31``; both int64 and of one shape.

    ``ties``: ``half-up`` is what integer hardware does, ``(q m + 2^(e-1)) >> e``; ``half-even`` what float
    emulations do, those of HAWQ-V3 among them. They differ at exact ties only.
    """

    mantissa: Tensor
    exponent: Tensor
    ties: Ties = "half-up"

    def __post_init__(self) -> None:
        if self.ties not in ("half-even", "half-up"):
            raise UsageError(f"ties of a requantization are 'half-even' or 'half-up'; got {self.ties!r}.")

    @staticmethod
    def of(ratio: Tensor | float, ties: Ties = "half-up") -> Dyadic:
        """The nearest to ``ratio``: relative error at most 2^-31.

        Args:
            ratio: positive, below 2^30; of any shape, calculated with in float64.
            ties: of what it rounds later.

        Raises:
            DataError: a ratio that isn't positive and finite, or too large.
        """
        r = torch.as_tensor(ratio, dtype=torch.float64)
        if not bool((torch.isfinite(r) & (r > 0) & (r < 2.0 ** (MANTISSA - 1))).all()):
            raise DataError(
                f"a ratio of scales is positive and below 2^30; got {r.min().item():g} to {r.max().item():g}. "
                "Calibrate the scales on data that reaches every layer."
            )
        fraction, power = torch.frexp(r)
        m = torch.floor(fraction * 2.0**MANTISSA + 0.5).to(torch.int64)
        full = m == 2**MANTISSA  # rounded up to 1
        return Dyadic(
            mantissa=torch.where(full, m // 2, m),
            exponent=MANTISSA - power.to(torch.int64) - full.to(torch.int64),
            ties=ties,
        )

    @property
    def value(self) -> Tensor:
        """What it multiplies with, float64, exact."""
        return torch.ldexp(self.mantissa.double(), -self.exponent)

    def apply(self, q: Tensor) -> Tensor:
        """``round(q m / 2^e)`` in int64; ``q`` is integer with magnitudes below :data:`LIMIT`."""
        product = q.to(torch.int64) * self.mantissa
        e = self.exponent.clamp(max=_SHIFT)
        half = torch.ones_like(e) << (e - 1)
        rounded = (product + half) >> e
        if self.ties == "half-even":
            tie = (product & ((half << 1) - 1)) == half
            rounded = rounded - (tie & ((rounded & 1) == 1)).to(torch.int64)
        return torch.where(self.exponent > _SHIFT, 0, rounded)

    def simulate(self, q: Tensor) -> Tensor:
        """The same in float64 alone, as an emulation on training hardware has it, for integers held in floats.

        ``q m`` has up to 62 bits, a float64 53: what the product's rounding lost is found exactly (Dekker 1971) and
        settles what looks like a tie.
        """
        by = self.value
        p = q * by
        lost = _lost(q, by, p)
        whole = torch.floor(p)
        part = p - whole  # exact
        odd = torch.remainder(whole, 2) == 1
        tie_up = odd if self.ties == "half-even" else torch.ones_like(odd)
        up = (part > 0.5) | ((part == 0.5) & ((lost > 0) | ((lost == 0) & tie_up)))
        return whole + up.to(p.dtype)


def _lost(a: Tensor, b: Tensor, p: Tensor) -> Tensor:
    """``a b - p`` for ``p = fl(a b)`` in float64, exactly."""
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    return ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low


def _split(a: Tensor) -> tuple[Tensor, Tensor]:
    """Two floats of 26 bits whose sum is ``a``."""
    c = a * (2.0**27 + 1)
    high = c - (c - a)
    return high, a - high
