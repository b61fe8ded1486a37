"""A linear layer whose weight is a QTensor and whose input and output may be rounded."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from nybble.nn.activation import ActivationQuantizer
from nybble.nn.layer import QuantLayer
from nybble.qtensor import QTensor


class QuantLinear(QuantLayer):
    """Stands for ``nn.Linear`` and GPT-2's ``Conv1D``; arguments as :class:`QuantLayer`, the weight [out, in]."""

    def __init__(
        self,
        weight: QTensor | Tensor,
        bias: Tensor | None = None,
        inputs: ActivationQuantizer | None = None,
        outputs: ActivationQuantizer | None = None,
    ) -> None:
        super().__init__(weight, bias, inputs, outputs)
        self.out_features, self.in_features = weight.shape

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return functional.linear(x, weight, self.bias)

    def extra_repr(self) -> str:  # noqa: D102
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
