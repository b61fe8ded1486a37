"""What quantized layers share: a weight, a bias, and quantizers of what enters and leaves."""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

import torch
from torch import Tensor, nn

from nybble.nn.activation import ActivationQuantizer
from nybble.nn.packed import Packed
from nybble.qtensor import QTensor


class QuantLayer(nn.Module):
    """``out(product(in(x), W) + b)``; W is dequantized in float32 and cast to the dtype of x, in which all runs.

    Where the float layer is in float32 and the model in 16 bits (some families keep layers so that would overflow), x
    becomes float32 too; the models ask for their layers' dtype themselves, of tensors only.

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

    def standing_for(self, dtype: torch.dtype) -> Self:
        """The same layer, told the dtype of the float weight in whose place it stands."""
        if isinstance(self.weight, Packed):
            self.weight.dtype = dtype
        return self

    def of_packed(self, x: Tensor, weight: Packed) -> Tensor:
        """:meth:`product` of a packed weight; layers for whose products there are kernels have their own."""
        return self.product(x, weight(x.dtype), self.bias)

    @abstractmethod
    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Of what enters, a dense weight and a bias, all in one dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """As the float layer."""
        x = widened(x, self.weight.dtype)
        if self.inputs is not None:
            x = self.inputs(x)
        weight = self.weight
        y = self.of_packed(x, weight) if isinstance(weight, Packed) else self.product(x, weight, self.bias)
        return y if self.outputs is None else self.outputs(y)


def widened(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``x`` in float32 if that is ``dtype``, a layer's; else as it is."""
    return x.float() if dtype == torch.float32 else x
