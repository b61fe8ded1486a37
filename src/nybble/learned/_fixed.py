"""A weight as a solver left it: nothing is learned, and what stands around it can be."""

from __future__ import annotations

from torch import Tensor

from nybble.learned import WEIGHTS, Learned
from nybble.qtensor import QTensor, QuantParams
from nybble.quantizer import Quantizer


class Fixed(Learned):
    """Gives the same values whatever weight it is shown.

    Args:
        packed: any kind of QTensor. quantizer: what to call it by.
    """

    def __init__(self, packed: QTensor, quantizer: Quantizer) -> None:
        super().__init__(quantizer, WEIGHTS)
        self._packed = packed

    def estimate(self, x: Tensor) -> Tensor:
        return self._packed.dequantize(x.dtype)

    def settle(self, x: Tensor) -> QTensor | QuantParams:
        return self._packed
