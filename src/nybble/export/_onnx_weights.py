"""Which of ONNX's types and cuts a packed matrix is, if any; without that library.

``DequantizeLinear`` (opset 21) has ``(code - zero_point) * scale`` in float32, as nybble has, with a
scale for the tensor, a row, or equal pieces of a row. A wider integer type holds the codes of a narrower format.
Codes of two bits take four: opset 25 has INT2, and onnxruntime's decoder reads it right, but by default (1.32, CPU) it
fuses decoder and product into something that gives other numbers. FLOAT4E2M1 has no kernel there at all.
Source: github.com/onnx/onnx, ``docs/Operators.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.formats import NumberFormat
from nybble.granularity import Granularity
from nybble.models.sources.layouts._ct_args import CannotError, in_words
from nybble.qtensor import Factored, Inverse, QTensor, dense
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer

FLOATS = {
    "float8_e4m3fn": "FLOAT8E4M3FN", "float8_e5m2": "FLOAT8E5M2", "float8_e4m3fnuz": "FLOAT8E4M3FNUZ",
    "float8_e5m2fnuz": "FLOAT8E5M2FNUZ",
}  # fmt: skip
RANGES = {"INT4": (-8, 7), "UINT4": (0, 15), "INT8": (-128, 127), "UINT8": (0, 255)}
NEAREST = "int8 channel, int4 group=32, float8_e4m3fn channel"
INPUTS = "int8 static, uint8 symmetric=false static, float8_e4m3fn static, int8 token"


@dataclass(frozen=True)
class Form:
    """How a matrix is written.

    Attributes:
        kind: ONNX's type of the codes. block: columns of a piece under one scale; 0 for whole rows, -1 for the tensor.
    """

    kind: str
    block: int


@dataclass(frozen=True)
class Coded:
    """What is written of a matrix [out, in].

    Attributes:
        form: its type and cut. codes: int16 of integers, uint8 bits of floats, [out, in].
        scale: float32 [], [out] or [out, pieces]. zero_point: int16 of its shape, or None.
    """

    form: Form
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


def integer_type(low: float, high: float) -> str | None:
    """The narrowest type that holds the integers from ``low`` to ``high``.

    >>> integer_type(-7, 7), integer_type(0, 200), integer_type(-1, 200)
    ('INT4', 'UINT8', None)
    """
    return next((name for name, (a, b) in RANGES.items() if a <= low and high <= b), None)


def form_of(tensor: QTensor) -> Form:
    """Of a matrix, which may be on the meta device.

    Raises:
        CannotError: ONNX has none.
    """
    came = in_words(tensor)
    if not isinstance(tensor, BlockQTensor):
        raise CannotError(came, NEAREST, "it is no format with a scale a block")
    params = tensor.params
    if params.grid is not None:
        raise CannotError(came, f"{NEAREST}, with their own code book", "its code book was learned")
    if params.offset is not None:
        raise CannotError(came, "int4 group=32 symmetric=false", "it has a real offset")
    if isinstance(params.scale, Factored | Inverse):
        raise CannotError(came, NEAREST, "its scales are no factors of their own")
    kind = _kind(tensor.format, params.zero_point, came)
    return Form(kind, _block(tensor.granularity, tensor.shape, came))


def _kind(fmt: NumberFormat, zero_point: Tensor | QTensor | None, came: str) -> str:
    if fmt.name in FLOATS and zero_point is None:
        return FLOATS[fmt.name]
    values = fmt.values
    if not bool((values == values.round()).all()):
        why = "onnxruntime has no kernels for it" if fmt.name == "float4_e2m1fn" else ""
        nearest = dict.fromkeys([f"int{min(8, max(2, fmt.bits))} group=32", *NEAREST.split(", ")])
        raise CannotError(came, ", ".join(nearest), why)
    low, high = float(values.min()), float(values.max())
    if zero_point is not None:
        plain = isinstance(zero_point, BlockQTensor) and zero_point.params.scale is None
        if not plain or not zero_point.format.is_integer:  # type: ignore[union-attr]
            raise CannotError(came, "int4 group=32 symmetric=false", "its zero points are no integers")
        theirs = zero_point.format.values  # type: ignore[union-attr]
        low, high = min(low, float(theirs.min())), max(high, float(theirs.max()))
    found = integer_type(low, high)
    if found is None:
        raise CannotError(came, "int8 channel symmetric=false", "no type holds codes and zero points")
    return found


def _block(granularity: Granularity, shape: tuple[int, ...], came: str) -> int:
    """The longest pieces of rows in which all elements have one scale."""
    rows, columns = shape
    count = math.prod(granularity.scale_shape(shape))
    if count == 1:
        return -1
    ids = owners(granularity, (rows, columns))
    for pieces in (n for n in range(1, columns) if columns % n == 0):
        cut = ids.view(rows, pieces, -1)
        if bool((cut == cut[..., :1]).all()):
            return 0 if pieces == 1 else columns // pieces
    raise CannotError(came, NEAREST, "neighbours in a row have other scales")


def owners(granularity: Granularity, shape: tuple[int, int]) -> Tensor:
    """int64 [rows, columns]: the number of the block that each element belongs to."""
    blocks = granularity.to_blocks(torch.zeros(shape))
    return granularity.from_blocks(torch.arange(len(blocks))[:, None].expand(blocks.shape).contiguous(), shape)


def coded(tensor: QTensor) -> Coded:
    """A matrix as it is written.

    Raises:
        CannotError: ONNX has no words for it.
    """
    form = form_of(tensor)
    assert isinstance(tensor, BlockQTensor)
    rows, columns = tensor.shape
    first = torch.zeros(1, dtype=torch.int64)
    if form.block >= 0:
        ids = owners(tensor.granularity, (rows, columns))
        first = ids[:, 0] if form.block == 0 else ids[:, :: form.block]
    scale, zero = tensor.params.scale, tensor.params.zero_point
    scales = torch.ones(1) if scale is None else dense(scale).float().reshape(-1)  # type: ignore[arg-type]
    scales = scales.expand(int(first.max()) + 1) if len(scales) == 1 else scales
    codes = tensor.unpacked()
    if form.kind in RANGES:
        table = torch.from_numpy(tensor.format.values.copy()).to(torch.int16)
        codes = table[codes.long()]
    zeros = None if zero is None else dense(zero).reshape(-1)[first].to(torch.int16)
    found = scales[first]
    shape = () if form.block == -1 else found.shape
    return Coded(form, codes, found.reshape(shape), None if zeros is None else zeros.reshape(shape))


def check_activation(quantizer: Quantizer) -> None:
    """Raise CannotError for activations that no ``QuantizeLinear`` rounds as nybble does."""
    came, fmt = str(quantizer), quantizer.format
    if fmt.name not in FLOATS and not (fmt.is_integer and 2 < fmt.bits <= 8):
        raise CannotError(came, INPUTS)
    if quantizer.rounding != "nearest-even":
        raise CannotError(came, str(quantizer.replace(rounding="nearest-even")))
    if quantizer.reciprocal or quantizer.raw_scale or quantizer.center or quantizer.scale.has_offset:
        raise CannotError(came, INPUTS, "ONNX divides by the scale that it keeps, and has no means")
    word = str(quantizer.granularity)
    if quantizer.static and word != "tensor":
        raise CannotError(came, INPUTS)
    if not quantizer.static:
        plain = str(quantizer.scale) == "absmax" and quantizer.scale_format == "float32"
        if word not in ("tensor", "token") or not plain or quantizer.scale.needs_integer or not fmt.signed:
            raise CannotError(came, INPUTS)
