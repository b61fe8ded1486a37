"""A linear layer whose weight is a QTensor and whose input and output may be rounded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nybble.nn.layer import QuantLayer
from nybble.nn.packed import Packed
from nybble.nn.products import DEVICES


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

    def of_packed(self, x: Tensor, weight: Packed) -> Tensor:
        """As :func:`nybble.nn.products.reference`, by the kernel for where x is; a gradient takes the readable way."""
        if weight.held(x.dtype) or (torch.is_grad_enabled() and x.requires_grad) or x.device.type not in DEVICES:
            return self.product(x, weight(x.dtype))
        return weight.linear(x, self.bias)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return functional.linear(x, weight, self.bias)

    def extra_repr(self) -> str:  # noqa: D102
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
