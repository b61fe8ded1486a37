"""A quantized linear layer behind a rotation of its input."""

from __future__ import annotations

from torch import Tensor

from nybble.nn.activation import ActivationQuantizer
from nybble.nn.layer import widened
from nybble.nn.linear import QuantLinear
from nybble.nn.rotation import BlockRotation
from nybble.qtensor import QTensor


class RotatedQuantLinear(QuantLinear):
    """``out(in(x V) W^T + b)``, where W is the float layer's weight times V.

    Args:
        weight: QTensor [out, in], or a plain tensor; rotated.
        bias: [out] or None.
        inputs: of what enters, once it is rotated. outputs: of what leaves.
        rotation: V.
    """

    def __init__(
        self,
        weight: QTensor | Tensor,
        bias: Tensor | None,
        inputs: ActivationQuantizer | None,
        outputs: ActivationQuantizer | None,
        rotation: BlockRotation,
    ) -> None:
        super().__init__(weight, bias, inputs, outputs)
        self.rotation = rotation

    def enters(self, x: Tensor) -> Tensor:
        """``x V``."""
        found: Tensor = self.rotation(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """As the float layer."""
        return super().forward(self.enters(widened(x, self.weight.dtype)))
