"""Grid: the values that the elements of one tensor may take, before scale and offset.

It is what stands between ``y = (x - offset) / scale`` and codes: a format (or a learned code book in its place), a tie
rule (or learned thresholds), and integer zero points. Values are ``decode(code) - zero_point``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import DataError, SchemeError
from nybble.core.shapes import Float32, Integer
from nybble.formats import NumberFormat
from nybble.ops.rounding import (
    decode,
    draw_on,
    encode,
    grid_table,
    round_stochastic,
    round_to,
    round_to_codes,
)
from nybble.ops.tables import decision_points, neighbours, table_decode, table_encode, table_round
from nybble.rounding import get_rounding

Round = Callable[[Tensor, "Grid"], Tensor]
"""``(y, grid) -> values``: float32 [blocks, elements] both, in the units of ``x / scale``, zero point taken off.

A rounding that training moves (AdaRound, FlexRound), or noise in its place: values of the grid or, while it trains,
between them; its gradients are its own affair (:func:`nearest` and :func:`straight_through` help).
"""


@dataclass(frozen=True, eq=False)
class Grid:
    """The values that elements may take.

    Attributes:
        format: of the codes. rounding: its tie rule by name, or stochastic.
        floor: ``normal`` or ``subnormal``: the smallest magnitude that is ever stored; empty without.
        zero: zero points, float32 integers [blocks, 1], or None.
        table: learned values, float32 [2**bits], one for each code, in place of the format's.
        thresholds: learned decision points, float32, ascending, in place of the tie rule.
    """

    format: NumberFormat
    rounding: str = "nearest-even"
    floor: str = ""
    zero: Float32[Tensor, "blocks 1"] | None = None
    table: Float32[Tensor, " codes"] | None = None
    thresholds: Float32[Tensor, " points"] | None = None

    def __post_init__(self) -> None:
        if self.table is None:
            return
        if self.zero is not None or self.floor:
            raise SchemeError(
                f"a learned grid in place of {self.format.name} takes no {'floor' if self.floor else 'zero point'}; "
                "shift the grid's own values (or use an offset)."
            )
        if self.table.shape != (2**self.format.bits,):
            raise DataError(
                f"a learned grid in place of {self.format.name} has {2**self.format.bits} values, one for each code; "
                f"got {list(self.table.shape)}."
            )

    @cached_property
    def _book(self) -> tuple[Tensor, Tensor, Tensor]:
        """Thresholds, ascending values and codes of the learned table."""
        assert self.table is not None
        ties = "nearest-even" if self.thresholds is not None or self._stochastic else self.rounding
        return decision_points(self.table, ties)

    @property
    def _stochastic(self) -> bool:
        return get_rounding(self.rounding).stochastic

    @cached_property
    def low(self) -> Tensor | float:
        """Smallest value: a number, or float32 that broadcasts against blocks; only zero points give it a gradient."""
        if self.table is not None:
            return self._book[1][0]
        return self.format.min if self.zero is None else self.format.min - self.zero

    @cached_property
    def high(self) -> Tensor | float:
        """Largest value, as :attr:`low`."""
        if self.table is not None:
            return self._book[1][-1]
        return self.format.max if self.zero is None else self.format.max - self.zero

    def clamp(self, y: Tensor) -> Tensor:
        """``y`` held inside the range; gradient 1 from :attr:`low` to :attr:`high`, both included, and 0 outside."""
        return torch.clamp(y, self.low, self.high)  # type: ignore[arg-type]  # both numbers, or both tensors

    def nearest(
        self, y: Float32[Tensor, "*shape"], generator: torch.Generator | None = None
    ) -> Float32[Tensor, "*shape"]:
        """The value that ``y`` is rounded to by the quantizer's own rule; saturates.

        Args:
            y: float32 [blocks, elements]; without zero points any shape will do.
            generator: for rounding=stochastic.

        Returns:
            float32, shape of ``y``; a gradient reaches a learned :attr:`table` that wants one, nothing else.
        """
        y = y.detach()
        if self.table is not None and self.table.requires_grad:
            return self.decode(self.encode(y, generator))
        values, settled = self._placed(y, generator)
        if not settled:
            values = round_to(values, self.format.name, self.rounding)
        return values if self.zero is None else values - self.zero.detach()

    def encode(
        self, y: Float32[Tensor, "*shape"], generator: torch.Generator | None = None
    ) -> Integer[Tensor, "*shape"]:
        """Codes of :meth:`nearest`: uint8 (int32 above 8 bits), shape of ``y``."""
        if self.table is not None and not self._stochastic:
            return self._table_codes(y.detach(), self.thresholds)
        values, settled = self._placed(y.detach(), generator)
        if self.table is not None:
            return self._table_codes(values)
        found: Tensor = encode(values.contiguous(), self.format.name, "nearest-even" if settled else self.rounding)
        return found

    def _placed(self, y: Tensor, generator: torch.Generator | None) -> tuple[Tensor, bool]:
        """``y``, and whether it lies on the grid already (the zero point added); else the tie rule is to come."""
        settled = True
        if self.table is not None:
            thresholds, values, _ = self._book
            if self._stochastic and self.thresholds is None:
                y = draw_on(y, values, generator)
            else:
                y = (
                    table_round(self._signed(y), thresholds, values)
                    if self.thresholds is None
                    else self._ranked(y, values)
                )
        elif self.thresholds is not None:
            y = self._ranked(y, grid_table(self.format.name, y.device))
        elif self.zero is not None:
            y = self._whole(y, self.zero.detach(), generator)
        elif self._stochastic:
            y = round_stochastic(y, self.format.name, generator)
        else:
            settled = False
        if self.floor:
            least = self.format.min_normal if self.floor == "normal" else self.format.smallest
            y = torch.where(y.isnan(), y, torch.where(y < 0, y.clamp(max=-least), y.clamp(min=least)))
        return y, settled

    def _ranked(self, y: Tensor, values: Tensor) -> Tensor:
        assert self.thresholds is not None
        found: Tensor = table_round(y, self.thresholds.detach(), values)
        return found

    def _whole(self, y: Tensor, zero: Tensor, generator: torch.Generator | None) -> Tensor:
        if not self._stochastic:
            return round_to_codes(y, zero, self.format.min, self.format.max, self.rounding)
        below = torch.floor(y)
        up = torch.rand(y.shape, generator=generator, dtype=torch.float32, device=y.device) < y - below
        return (below + up + zero).clamp(self.format.min, self.format.max)

    def _table_codes(self, y: Tensor, thresholds: Tensor | None = None) -> Tensor:
        own, _, codes = self._book
        if thresholds is None:
            y, thresholds = self._signed(y), own
        found: Tensor = table_encode(y, thresholds, codes)
        return found

    def _signed(self, y: Tensor) -> Tensor:
        """-0 as the next number below it, where the table has a -0: a threshold of +0 doesn't see the sign."""
        values = self._book[1]
        kept = ((values == 0) & values.signbit()).any()
        return torch.where((y == 0) & y.signbit() & kept, -(2.0**-149), y)

    def codes(self, values: Tensor, real: Tensor | None = None) -> Tensor:
        """The code of each value of the grid, exactly: -0 and zero points too.

        Args:
            values: float32 [blocks, elements], as a :data:`Round` returns them.
            real: which elements are no padding, bool of that shape; None: all.

        Returns:
            uint8 (int32 above 8 bits), shape of ``values``.

        Raises:
            DataError: some are not on the grid (a rounding that hasn't settled); waits for the device.
        """
        values = values.detach().float()
        if self.table is not None:
            found = self._table_codes(values)
        else:
            whole = values if self.zero is None else values + self.zero.detach()
            found = encode(whole.contiguous(), self.format.name, "nearest-even")
        back = self.decode(found).detach()
        wrong = (back != values) & ~(back.isnan() & values.isnan())
        if real is not None:
            wrong &= real
        if bool(wrong.any()):
            count = wrong.numel() if real is None else int(real.sum())
            raise DataError(
                f"{int(wrong.sum())} of {count} values are not on the grid of {self._name}, "
                f"{float(values[wrong][0]):g} for one: a rounding that still returns values between; settle it first."
            )
        return found

    def decode(self, codes: Tensor) -> Tensor:
        """Values of codes, zero point taken off; a learned :attr:`table` gets its gradient."""
        if self.table is not None:
            if self.table.requires_grad:
                return self.table[codes.int()]
            found: Tensor = table_decode(codes, self.table)
            return found
        values: Tensor = decode(codes, self.format.name)
        return values if self.zero is None else values - self.zero.detach()

    def neighbours(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``lower <= y < upper`` among the values, saturating: see :func:`nybble.ops.tables.neighbours`."""
        if self.zero is None:
            return neighbours(y, self.format if self.table is None else self.table)
        below, zero = torch.floor(y.detach()), self.zero.detach()
        low, high = self.format.min - zero, self.format.max - zero
        return torch.clamp(below, low, high), torch.clamp(below + 1, low, high)

    @property
    def _name(self) -> str:
        return self.format.name if self.table is None else f"a learned table in place of {self.format.name}"


def nearest(y: Tensor, grid: Grid, generator: torch.Generator | None = None) -> Tensor:
    """The quantizer's own rounding, straight through with clipping: the default :data:`Round`.

    For rounding=stochastic give ``partial(nearest, generator=g)``: without one, torch's global generator draws.

    The gradient of y is 1 inside the range and 0 outside (Bengio et al. 2013, arXiv:1308.3432, with the clipping of
    PACT). In ``scale * (nearest(y) - zero_point)`` that makes the scale's gradient LSQ's (Esser et al. 2020,
    arXiv:1902.08153, eq. 3): round(y) - y inside, the smallest or largest value outside. At the very ends of the range
    we count as inside, as torch.clamp does; the paper doesn't.
    """
    return straight_through(grid.nearest(y, generator), grid.clamp(y))


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """``value`` forward, bit for bit; backward the gradient of ``surrogate`` (and of ``value``, where it has one).

    Exact where ``surrogate + (value - surrogate).detach()`` rounds twice. Both of one shape.
    """
    found: Tensor = _StraightThrough.apply(value, surrogate)  # type: ignore[no-untyped-call]
    return found


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, surrogate: Tensor) -> Tensor:
        if value.shape != surrogate.shape:
            raise DataError(
                f"straight_through: value {list(value.shape)} and surrogate {list(surrogate.shape)} differ."
            )
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient

    @staticmethod
    def jvp(ctx: Any, value: Tensor | None, surrogate: Tensor | None) -> Tensor | None:
        return surrogate if value is None else value if surrogate is None else value + surrogate
