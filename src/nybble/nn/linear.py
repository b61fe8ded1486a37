"""A linear layer whose weight is a QTensor and whose input and output may be rounded."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from nybble.nn.layer import QuantLayer


class QuantLinear(QuantLayer):
    """Stands for ``nn.Linear`` and GPT-2's ``Conv1D``; arguments as :class:`QuantLayer`, the weight [out, in]."""

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.weight.shape[1]

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return functional.linear(x, weight, self.bias)

    def extra_repr(self) -> str:  # noqa: D102
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
