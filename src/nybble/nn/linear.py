"""A linear layer whose weight is a QTensor and whose input and output may be rounded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nybble.nn import float_products
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.float_products import float_linear
from nybble.nn.integer_products import integer_linear
from nybble.nn.layer import QuantLayer, widened
from nybble.nn.packed import Packed
from nybble.nn.products import DEVICES, Operator
from nybble.nn.recomputed import recomputed_linear


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

    def enters(self, x: Tensor) -> Tensor:
        """What the weight is multiplied with, before it is rounded, for an input [..., in]: as it is."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """As the float layer; two rounded sides are multiplied as codes where there is a kernel."""
        x = widened(x, self.weight.dtype)
        weight, inputs = self.weight, self.inputs
        if not isinstance(weight, Packed) or inputs is None or not self._free(x, weight, inputs):
            return super().forward(x)
        op = _operator(weight, inputs, x.device.type)
        if op is None:
            return super().forward(x)
        y = weight.rounded_linear(op, x, self.bias, inputs)
        return y if self.outputs is None else self.outputs(y)

    def _free(self, x: Tensor, weight: Packed, inputs: ActivationQuantizer) -> bool:
        """Whether nothing wants the floats: a gradient, a hook, a held copy."""
        free = not weight.held(x.dtype) and not (torch.is_grad_enabled() and x.requires_grad)
        return free and not inputs.watched and not weight.brought

    def how(self) -> tuple[bool, str]:
        """Whether there is a kernel for this layer where its weight is; its name, or why there is none."""
        if not isinstance(self.weight, Packed):
            return False, "a weight in float"
        if self.inputs is not None:
            op = _operator(self.weight, self.inputs, self.weight.device.type)
            found = (False, "") if op is None else self.weight.how(op, self.inputs)
            if found[0]:
                return found
        return self.weight.how()

    def of_packed(self, x: Tensor, weight: Packed) -> Tensor:
        """As :func:`nybble.nn.products.reference`, by the kernel for where x is; a gradient takes the readable way."""
        trains = x.requires_grad or (self.bias is not None and self.bias.requires_grad)
        gradient = torch.is_grad_enabled() and trains
        if weight.held(x.dtype) or weight.brought or (gradient and torch.compiler.is_compiling()):
            return self.product(x, weight(x.dtype), self.bias)
        if gradient:
            return recomputed_linear(x, weight, self.bias)
        if x.device.type not in DEVICES:
            return self.product(x, weight(x.dtype), self.bias)
        return weight.linear(x, self.bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[..., in] -> [..., out]."""
        return functional.linear(x, weight, bias)

    def extra_repr(self) -> str:  # noqa: D102
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _operator(weight: Packed, inputs: ActivationQuantizer, device: str) -> Operator | None:
    """What multiplies two rounded sides as they are, on a type of device; None: nothing does."""
    if weight.whole and inputs.whole and device in DEVICES:
        return integer_linear
    if weight.few and inputs.few and device in float_products.DEVICES:
        return float_linear
    return None
