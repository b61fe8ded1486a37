"""What ``torch.compile`` and ``torch.export`` see of quantized modules: one operator each, so that no graph breaks.

A Quantizer and a QTensor are records of names (formats, roundings, layouts) that Python looks up as it goes; a compiler
that followed it would stop at every look-up. Behind these operators runs what runs without a compiler: the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import UsageError
from nybble.nn.operands import FLOATS, check_floats, record_of
from nybble.ops.grid import Grid
from nybble.ops.reaching import reach
from nybble.qtensor import Factored, Inverse, QuantParams, Spec, from_spec
from nybble.quantizer import Quantizer


def key_of(spec: Spec, names: Sequence[str]) -> str:
    """What :func:`dequantize` needs beside the tensors of a QTensor: its spec and their names, as JSON."""
    return json.dumps({"spec": spec, "names": list(names)})


@torch.library.custom_op(
    "nybble::dequantize",
    mutates_args=(),
    schema="(Tensor[] tensors, str key, int[] shape, ScalarType dtype) -> Tensor",
)
def dequantize(tensors: Sequence[Tensor], key: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The values of a QTensor of any kind.

    Args:
        tensors: in the order that ``key`` has.
        key: of :func:`key_of`.
        shape: of the QTensor.
        dtype: of what comes out, a float's.

    Raises:
        UsageError: they don't fit each other.
    """
    if dtype not in FLOATS:
        raise UsageError(f"dequantize: values in {dtype}; they come in float32, bfloat16, float16 or float64.")
    record = record_of(key)
    if record["spec"].get("shape", list(shape)) != list(shape) or len(tensors) != len(record["names"]):
        raise UsageError(
            f"dequantize: {len(tensors)} tensors of a weight {list(shape)} are not what the key describes."
        )
    found = from_spec(record["spec"], dict(zip(record["names"], tensors, strict=True)))
    return found.dequantize(dtype).contiguous()


@dequantize.register_fake
def _(tensors: Sequence[Tensor], key: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty(shape, dtype=dtype)


@torch.library.custom_op(
    "nybble::fake_quantize",
    mutates_args=(),
    schema="(Tensor x, Tensor[] parts, str names, str line) -> Tensor",
)
def fake_quantize(x: Tensor, parts: Sequence[Tensor], names: str, line: str) -> Tensor:
    """Activations rounded as the quantizer ``line`` says.

    A gradient goes straight through, where nothing was clipped (Bengio et al. 2013): as
    :class:`nybble.learned.ste.StraightThrough` has it.

    Args:
        x: float32, float16 or bfloat16.
        parts: static parameters; none where every tensor is measured.
        names: theirs, with spaces between.
        line: of the quantizer.
    """
    check_floats("fake_quantize", x)
    quantizer = quantizer_of(line)
    return quantizer.fake_quantize(
        x, static_params(quantizer, dict(zip(names.split(), parts, strict=True)))
    ).contiguous()


@fake_quantize.register_fake
def _(x: Tensor, parts: Sequence[Tensor], names: str, line: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "nybble::fake_quantize_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor x, Tensor[] parts, str names, str line) -> Tensor",
)
def fake_quantize_backward(gradient: Tensor, x: Tensor, parts: Sequence[Tensor], names: str, line: str) -> Tensor:
    """The gradient of x in :func:`fake_quantize`; arguments as there. No autograd runs inside an operator."""
    quantizer, inside = quantizer_of(line), []

    def look(y: Tensor, grid: Grid) -> Tensor:
        low, high = reach(y, grid)
        inside.append((low <= y) & (y <= high))
        return y

    quantizer.soft(x, static_params(quantizer, dict(zip(names.split(), parts, strict=True))), look)
    return (gradient * quantizer.granularity.from_blocks(inside[0], x.shape)).contiguous()


@fake_quantize_backward.register_fake
def _(gradient: Tensor, x: Tensor, parts: Sequence[Tensor], names: str, line: str) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, parts, ctx.names, ctx.line = inputs
    ctx.save_for_backward(x, *parts)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    x, *parts = ctx.saved_tensors
    return fake_quantize_backward(gradient, x, parts, ctx.names, ctx.line), [None] * len(parts), None, None


fake_quantize.register_autograd(_backward, setup_context=_keep)


def static_params(quantizer: Quantizer, parts: Mapping[str, Tensor]) -> QuantParams | None:
    """Parameters of a static quantizer from what is stored of them, by name; None of one that measures every tensor."""
    if not quantizer.static:
        return None
    if "divisor" in parts:
        return QuantParams(Inverse(parts["divisor"]))
    granularity = quantizer.granularity
    scale: Tensor | Factored | None = parts.get("scale")
    if granularity.stored and granularity.stored.keys() <= parts.keys():
        scale = Factored(granularity.restore(parts), granularity.combine)
    shift, thresholds = parts.get("shift"), parts.get("thresholds")
    return QuantParams(scale, parts.get("zero_point"), parts.get("offset"), thresholds, shift=shift)


@cache
def quantizer_of(line: str) -> Quantizer:
    """The quantizer of a line, made once."""
    return Quantizer(line)
