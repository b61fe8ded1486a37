"""A linear layer whose weight is a QTensor and whose input and output may be rounded."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from nybble.nn.activation import ActivationQuantizer
from nybble.nn.packed import Packed
from nybble.qtensor import QTensor


class QuantLinear(nn.Module):
    """``y = out(in(x) @ W.T + b)``: W is dequantized in float32 and cast to the dtype of x, in which the product runs.

    Args:
        weight: QTensor [out, in], or a plain tensor where a scheme leaves weights in float.
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
        self.out_features, self.in_features = weight.shape
        if isinstance(weight, QTensor):
            self.weight: Packed | nn.Parameter = Packed(weight)
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.inputs, self.outputs = inputs, outputs

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.inputs is not None:
            x = self.inputs(x)
        weight = self.weight.dequantize(x.dtype) if isinstance(self.weight, Packed) else self.weight
        y = functional.linear(x, weight, self.bias)
        return y if self.outputs is None else self.outputs(y)

    def extra_repr(self) -> str:  # noqa: D102
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
