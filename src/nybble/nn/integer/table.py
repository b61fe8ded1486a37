"""Any function of few codes as a table: one entry a code. Source: BCT (Dong & Chen 2023, arXiv:2304.01483)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.core.errors import DataError

MOST = 2**16
"""Entries."""


@dataclass(frozen=True)
class Table:
    """Codes of ``function(S q)`` for every ``q`` from ``lowest`` on.

    Attributes:
        entries: int64. lowest: the first one's code. scale: of the entries.
    """

    entries: Tensor
    lowest: int
    scale: float

    @staticmethod
    def of(function: Callable[[Tensor], Tensor], scale: float, codes: tuple[int, int], bits: int = 8) -> Table:
        """Calculated in float64 before the first input comes, rounded half to even.

        Args:
            function: elementwise, of float64.
            scale: of the inputs.
            codes: their least and largest.
            bits: of the entries, signed; the largest magnitude becomes 2^(bits-1) - 1.

        Raises:
            DataError: too many codes, or a function that isn't finite on them.
        """
        lowest, highest = codes
        if not 0 <= highest - lowest < MOST:
            raise DataError(f"a table has 1 to {MOST:,} entries; codes from {lowest} to {highest} don't fit.")
        values = function(torch.arange(lowest, highest + 1, dtype=torch.float64) * scale)
        if not bool(torch.isfinite(values).all()):
            raise DataError(f"the function is not finite on all of {lowest * scale:g} to {highest * scale:g}.")
        largest = float(values.abs().max())
        fine = largest / (2 ** (bits - 1) - 1) if largest else 1.0
        return Table(torch.round(values / fine).to(torch.int64), lowest, fine)

    def __call__(self, q: Tensor) -> tuple[Tensor, float]:
        """Look codes up; those outside become the nearest that are inside."""
        index = (q.to(torch.int64) - self.lowest).clamp(0, len(self.entries) - 1)
        return self.entries[index], self.scale
