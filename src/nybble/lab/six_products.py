"""Linear layers whose three products round each of their six operands apart, as in Sun et al. 2025 (arXiv:2501.02423).

``Y = X W^T`` reads P1 = X and P2 = W; ``dX = dY W`` reads P3 = dY and P4 = W; ``dW = dY^T X`` reads P5 = dY and P6 = X.
Scales are shared along the axis that a product sums over; gradients pass a rounding unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nybble.quantizer import Quantizer

OPERANDS = ("P1", "P2", "P3", "P4", "P5", "P6")


class SixProducts(torch.autograd.Function):
    """See :func:`multiply`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, six: Sequence[Quantizer | None], dtype: torch.dtype) -> Tensor:
        """[rows, out]."""
        ctx.save_for_backward(x, w)
        ctx.six, ctx.dtype = six, dtype
        return (_rounded(x, six[0], dtype) @ _rounded(w, six[1], dtype).T).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """Of x and w."""
        (x, w), six, dtype = ctx.saved_tensors, ctx.six, ctx.dtype
        dx = _rounded(dy, six[2], dtype) @ _rounded(w.T, six[3], dtype).T  # sums over the outputs
        dw = _rounded(dy.T, six[4], dtype) @ _rounded(x.T, six[5], dtype).T  # sums over the rows
        return dx.to(x.dtype), dw.to(w.dtype), None, None


def _rounded(x: Tensor, quantizer: Quantizer | None, dtype: torch.dtype) -> Tensor:
    """Scales along the last axis."""
    if quantizer is None:
        return x.to(dtype)
    rounded: Tensor = quantizer.fake_quantize(x.detach().float().contiguous())
    return rounded.to(dtype)


def multiply(x: Tensor, w: Tensor, six: Sequence[Quantizer | None], dtype: torch.dtype) -> Tensor:
    """``x w^T`` of [rows, in] and [out, in]; quantizers of P1 to P6 (None: not rounded), the dtype of the products."""
    made: Tensor = SixProducts.apply(x, w, six, dtype)  # type: ignore[no-untyped-call]
    return made


class SixLinear(nn.Linear):
    """A linear layer without a bias that multiplies so."""

    six: Sequence[Quantizer | None] = (None,) * 6
    dtype: torch.dtype = torch.float32

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        flat = input.reshape(-1, input.shape[-1])
        made = multiply(flat, self.weight, self.six, self.dtype)
        return made.reshape(*input.shape[:-1], -1)


def swap(model: nn.Module, six: Sequence[Quantizer | None], dtype: torch.dtype) -> int:
    """Let all linear layers of ``model`` multiply so; how many weights they have."""
    count = 0
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None:
            module.__class__ = SixLinear
            module.six, module.dtype = tuple(six), dtype
            count += module.weight.numel()
    return count


def quantizer_of(exponent: int, mantissa: int, block: int | str) -> Quantizer:
    """The format without infinities and NaN, subnormals among it, one float32 scale for ``block`` elements of a row.

    ``channel``: a scale a row. Without exponent bits the format is a grid of signed magnitudes.
    """
    bits = 1 + exponent + mantissa
    name = f"float{bits}_e{exponent}m{mantissa}_finite" if exponent else f"int{bits}"
    cut = "channel" if block == "channel" else f"group={block} pad=true"
    return Quantizer(f"{name} {cut} scale_format=float32")
