"""``x W^T`` of a packed weight that stays as it is, with a gradient for x: backward dequantizes W again.

So a layer in training holds its codes and no matrix between forward and backward (QLoRA: Dettmers et al. 2023,
arXiv:2305.14314, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nybble.nn.packed import Packed


def recomputed_linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """As ``functional.linear`` of the dequantized weight, bit for bit in both directions.

    Args:
        x: [..., in], a float.
        weight: [out, in]; its codes must be the same in backward.
        bias: [out] or None; may want a gradient too.

    Returns:
        [..., out], of the dtype of x (under autocast of autocast's).
    """
    made: Tensor = _Recomputed.apply(x, bias, weight)  # type: ignore[no-untyped-call]
    return made


class _Recomputed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, weight: Packed) -> Tensor:
        return functional.linear(x, weight(x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ctx.weight = inputs
        ctx.dtype, ctx.shape = x.dtype, output.shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:  # in the dtype of forward's product, which autocast may have chosen
            of_x = gradient @ ctx.weight(ctx.dtype).to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = gradient.flatten(0, -2).sum(0) if gradient.dim() > 1 else gradient
        return of_x, of_bias, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, bias: Tensor | None, _: None) -> Tensor:
        if x is None:
            assert bias is not None
            return bias.expand(ctx.shape).clone()
        return functional.linear(x, ctx.weight(ctx.dtype), bias)
