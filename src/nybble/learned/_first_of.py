"""Several parts for one role: each quantizer is learned by the first that can."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.learned import WEIGHTS, Learned, Part, part_name
from nybble.qtensor import QuantParams
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer


class FirstOf(Part):
    """Stands for a part: a scheme may have static activations here, whose scale learns, and measured ones there.

    Args:
        parts: in order.

    Raises:
        SchemeError: there are none, or one keeps the weight as it is, which the others don't.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        if not parts:
            raise SchemeError("a list of learned parts is empty; name one, or leave it out.")
        fixing = next((part for part in parts if part.fixes_x), None)
        if fixing is not None and len(parts) > 1:
            raise SchemeError(
                f"{part_name(fixing)} keeps the weight as it is, and stands alone; take it out of the list."
            )
        self.parts = tuple(parts)

    def chosen(self, quantizer: Quantizer, side: str) -> Part:
        """The one that learns a quantizer.

        Raises:
            SchemeError: none can; what the first says.
        """
        errors = []
        for part in self.parts:
            try:
                part.check(quantizer, side)
            except SchemeError as error:
                errors.append(error)
            else:
                return part
        raise errors[0]

    def check(self, quantizer: Quantizer, side: str = WEIGHTS) -> None:
        self.chosen(quantizer, side)

    def make(
        self, quantizer: Quantizer, x: Tensor, start: BlockQTensor | QuantParams | None = None, side: str = WEIGHTS
    ) -> Learned:
        return self.chosen(quantizer, side).make(quantizer, x, start, side)

    def begin(self, quantizer: Quantizer, x: Tensor, start: QuantParams | None, side: str) -> Learned:
        return self.chosen(quantizer, side).begin(quantizer, x, start, side)
