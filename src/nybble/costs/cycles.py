"""Cycles of a sample on a *modelled* accelerator, whose 8-bit multipliers split into 4- and 2-bit ones (DyBit's kind).

A systolic array of ``side`` x ``side`` processing elements holds a tile of outputs. A multiplier of 8 x 8 bits does
(8/w) (8/x) products of w-bit weights and x-bit inputs in a cycle: a column serves 8/w outputs of the layer, a row 8/x
rows of its input. Widths go up to 2, 4 or 8::

    cycles = groups of outputs x groups of rows x (columns + 2 side - 2)      outputs in groups of side * 8/w,
                                                                            rows in groups of side * 8/x

where the last addends fill and empty the array. Nothing is measured, and memory is as fast as it has to be. DyBit
(Zhou et al. 2023, arXiv:2302.12510) has such an accelerator on an FPGA; this formula is ours, and so are its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nybble.core.errors import SchemeError
from nybble.core.options import at_least_one
from nybble.costs import Cost, Sized
from nybble.quantizer import Quantizer

WIDTHS = (2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Cycles(Cost):
    """Inputs that nothing quantizes have 8 bits there.

    Attributes:
        side: processing elements in a row, and in a column.
    """

    side: int = 16
    unit: ClassVar[str] = "modelled cycles of a sample"
    needs_macs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least_one(side=self.side)

    def of(self, layer: Sized, weights: Quantizer) -> int:  # noqa: D102
        outputs, columns = layer.shape
        rows = -(-layer.macs // max(1, outputs * columns))
        w = _width(layer.name, weights)
        x = WIDTHS[-1] if layer.inputs is None else _width(layer.name, layer.inputs)
        across, down = -(-outputs * w // (8 * self.side)), -(-rows * x // (8 * self.side))
        return across * down * (columns + 2 * self.side - 2)


def _width(name: str, quantizer: Quantizer) -> int:
    bits = quantizer.format.bits
    if bits > WIDTHS[-1]:
        raise SchemeError(
            f"{name}: {quantizer} has {bits} bits, and the modelled multipliers have {WIDTHS[-1]}; leave it out of the "
            "menu, or give a budget of bops."
        )
    return next(width for width in WIDTHS if width >= bits)


PART = Cycles
