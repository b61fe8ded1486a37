"""Any function of blocks by tables: one of 255 entries for each shift that an 8-bit strip can have.

Source: BCT (arXiv:2304.01483): GELU from a look-up table, which depends on the input's shift.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nybble.core.errors import DataError
from nybble.nn.integer.blocks import Blocks, narrow
from nybble.nn.integer.shifts import power_of_two, shift_right

LEAST, MOST = -16, 31
"""Shifts that have a table. Finer strips are shifted to the last one first; coarser ones have magnitudes above 2^16."""
TOP = 127
BITS = 16


class BlockTable(nn.Module):
    """``function(q 2^-t)``.

    Args:
        function: elementwise, of float64, finite up to 2^23.

    Raises:
        DataError: a function that isn't finite.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        codes = torch.arange(-TOP, TOP + 1, dtype=torch.float64)
        shifts = torch.arange(LEAST, MOST + 1)
        with torch.no_grad():
            values = function(codes * power_of_two(-shifts[:, None]))
        if not bool(torch.isfinite(values).all()):
            raise DataError("a table holds a function's finite values; this one has others between -2^23 and 2^23.")
        length = torch.frexp(values.abs().amax(1)).exponent
        found = torch.where(values.abs().amax(1) > 0, BITS - 1 - length, 0).to(torch.int64)
        entries = torch.floor(values * power_of_two(found[:, None]) + 0.5).clamp(
            1 - 2 ** (BITS - 1), 2 ** (BITS - 1) - 1
        )
        self.register_buffer("entries", entries.to(torch.int16))
        self.register_buffer("shifts", found)

    def forward(self, x: Blocks) -> Blocks:  # noqa: D102
        q, shifts = self.looked_up(x)
        return narrow(q, shifts, x.strip)

    def looked_up(self, x: Blocks) -> tuple[Tensor, Tensor]:
        """Entries, 15 bits and a sign, and their shifts, int64."""
        each, q = x.each(), x.wide()
        codes = shift_right(q, (each - MOST).clamp(min=0)).to(torch.int64)
        table = each.clamp(LEAST, MOST) - LEAST
        return self.get_buffer("entries").to(q.dtype)[table, codes + TOP], self.get_buffer("shifts")[table]
