"""Candidates of one quantizer: the range that its scale rule finds, times a fraction, for each row or for the whole."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.core.replay import replayed
from nybble.formats import NumberFormat
from nybble.formats.minifloat import Minifloat, make_minifloat
from nybble.qtensor import Inverse, QuantParams
from nybble.quantizer import Quantizer
from nybble.scales import BlockParams
from nybble.scales.minmax import fit_range

Error = Callable[[Tensor], Tensor]
"""Rounded values -> the objective of each unit, float32 [units]."""


class Ladder:
    """Rounded versions of one tensor under one quantizer, one for each fraction of the unclipped range.

    A unit owns a fraction: a row where the granularity keeps rows apart, else the whole tensor.

    Args:
        x: float32 [rows, columns].
        quantizer: of a granularity that can be searched.
    """

    def __init__(self, x: Tensor, quantizer: Quantizer) -> None:
        self.x, self.quantizer = x, quantizer
        check_searchable(quantizer)
        granularity = quantizer.granularity
        self.shape = tuple(x.shape)
        self.units = x.shape[0] if granularity.rows_apart else 1
        if granularity.factored:
            self.summary = granularity.summary(x)
            return
        blocks = granularity.to_blocks(x)
        mask = granularity.mask(self.shape, x.device)
        weight = None if mask is None else mask.float()
        self.base = quantizer.scale.fit(blocks, quantizer.format, quantizer.rounding, weight)
        self.ends = (blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True))
        self.outer: QuantParams | None = None
        if self.base.over is not None:
            self.outer = QuantParams(Inverse(self.base.over.reshape(1)))

    def params(self, fraction: Tensor) -> QuantParams:
        """Parameters for a fraction a unit, float32 [units]."""
        if self.quantizer.granularity.factored:
            return self.quantizer.factors(self.summary, fraction)
        by = fraction.repeat_interleave(self.base.scale.shape[0] // self.units).reshape(-1, 1)
        low, high = self.ends
        if self.base.zero_point is not None or self.base.offset is not None:
            offset = self.base.offset is not None
            found = fit_range(low * by, high * by, self.quantizer.format, offset=offset)
        else:
            found = BlockParams(self.base.scale * by)
        return self.quantizer.finish(found, self.quantizer.granularity.scale_shape(self.shape), self.outer)

    def values(self, fraction: Tensor) -> Tensor:
        """The tensor rounded with a fraction a unit."""
        return self.quantizer.fake_quantize(self.x, self.params(fraction))

    def on(self, x: Tensor) -> Ladder:
        """The same candidates for other rows [rows, columns]; for quantizers whose parameters are not one a row."""
        found = copy.copy(self)
        found.x, found.shape = x, tuple(x.shape)
        return found


def check_searchable(quantizer: Quantizer) -> None:
    """Raise SchemeError where no clip value can be tried."""
    granularity = quantizer.granularity
    if not granularity.searchable:
        raise SchemeError(
            f"{quantizer}: {granularity.word} factors are {granularity.factors_are}, so there is no clip value to "
            "search; use recipe rtn, or a scale a block: group, channel or block."
        )


def menu(fmt: NumberFormat) -> list[NumberFormat]:
    """The formats that compete with ``fmt``: for a minifloat every split of its bits into exponent and mantissa.

    e >= 1 (e = 0 would be the integers, which e = 1 is already); of 8 bits two are mantissa bits at least (wider
    exponents only add range that nothing uses). The format itself keeps its special values, the others have none.
    Wider formats are not searched.

    Raises:
        SchemeError: a minifloat of fewer than three bits, where there is nothing to choose.
    """
    if not isinstance(fmt, Minifloat) or fmt.bits > 8:
        return [fmt]
    if fmt.bits < 3:
        raise SchemeError(f"{fmt.name} has {fmt.bits} bits; floating-point formats are searched from 3 bits on.")
    width = fmt.bits - fmt.has_sign
    least = 0 if fmt.bits < 8 else 2
    others = [make_minifloat(e, width - e, signed=fmt.has_sign) for e in range(1, width - least + 1) if e != fmt.e]
    return [fmt, *others]


def with_format(quantizer: Quantizer, fmt: NumberFormat) -> Quantizer:
    """The same quantizer in another format."""
    if fmt == quantizer.format:
        return quantizer
    _, *words = str(quantizer).split(" ", 1)
    return Quantizer(" ".join([fmt.name, *words]))


def fractions(low: float, high: float, count: int, device: torch.device) -> Tensor:
    """``count`` fractions from low to high, evenly spaced in their logarithm: evenly in the exponent bias."""
    start, end = (torch.tensor(fraction, dtype=torch.float32).log2().item() for fraction in (low, high))
    return torch.logspace(start, end, count, 2.0, dtype=torch.float32, device=device)


def descend(
    ladder: Ladder, error: Error, best: tuple[Tensor, Tensor], grid: Tensor, fine: int = 0, step: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The best fraction of each unit among the grid, then among some around that; never worse than ``best``.

    Args:
        ladder: candidates.
        error: their objective.
        best: fraction and error to beat, both float32 [units].
        grid: fractions, float32 [candidates]; may be empty.
        fine: further candidates a unit, evenly spaced (in the logarithm) from its best divided by ``step`` to its best
            times ``step``, ends left out.
        step: a factor above 1.
    """
    candidate = replayed(lambda fraction: error(ladder.values(fraction)), best[0], len(grid) + fine)
    for fraction in grid:
        best = _better(candidate, best, fraction.expand(ladder.units))
    centre = best[0]
    for exponent in torch.linspace(-1, 1, fine + 2, dtype=torch.float32)[1:-1].tolist():
        best = _better(candidate, best, centre * step**exponent)
    return best


def _better(candidate: Error, best: tuple[Tensor, Tensor], fraction: Tensor) -> tuple[Tensor, Tensor]:
    found = candidate(fraction)
    wins = found < best[1]
    return torch.where(wins, fraction, best[0]), torch.where(wins, found, best[1])
