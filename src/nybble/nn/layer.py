"""What quantized layers share: a weight, a bias, and quantizers of what enters and leaves."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from nybble.nn.activation import ActivationQuantizer
from nybble.nn.packed import Packed
from nybble.qtensor import QTensor


class QuantLayer(nn.Module):
    """``out(product(in(x), W) + b)``; W is dequantized in float32 and cast to the dtype of x, in which all runs.

    Args:
        weight: QTensor, or a plain tensor where a scheme leaves weights in float.
        bias: [out] or None.
        inputs, outputs: quantizers of what enters and leaves.
    """

    def __init__(
        self,
        weight: QTensor | Tensor,
        bias: Tensor | None = None,
        inputs: ActivationQuantizer | None = None,
        outputs: ActivationQuantizer | None = None,
    ) -> None:
        super().__init__()
        if isinstance(weight, QTensor):
            self.weight: Packed | nn.Parameter = Packed(weight)
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.inputs, self.outputs = inputs, outputs

    @abstractmethod
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Of what enters and a dense weight, with the bias."""

    def forward(self, x: Tensor) -> Tensor:
        """As the float layer."""
        if self.inputs is not None:
            x = self.inputs(x)
        weight = self.weight.dequantize(x.dtype) if isinstance(self.weight, Packed) else self.weight
        y = self.product(x, weight)
        return y if self.outputs is None else self.outputs(y)
