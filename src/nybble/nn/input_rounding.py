"""Activations with measured scales, rounded by one operator, for which ``kernels/`` has versions of their own."""

from __future__ import annotations

from torch import Tensor

from nybble.nn.compiled import quantizer_of
from nybble.nn.operands import check_floats, check_static
from nybble.nn.products import Operator
from nybble.ops.loader import load_at_first_use


def reference(x: Tensor, line: str) -> Tensor:
    """``x`` rounded, without gradients.

    Args:
        x: float32, bfloat16 or float16, of a shape that the granularity can cut.
        line: of a quantizer that isn't static.

    Returns:
        shape and dtype of ``x``; a kernel's bits are the same.
    """
    return quantizer_of(line).fake_quantize(x).contiguous()


def _like(x: Tensor, line: str) -> Tensor:
    return x.new_empty(x.shape)


def _check(name: str, x: Tensor, line: str) -> None:
    check_floats(name, x)
    check_static(name, line, quantizer_of(line).static, (), "", x.device)


rounded_inputs = Operator("rounded_inputs", reference, "Tensor x, str line", _like, _check)
load_at_first_use([rounded_inputs])
