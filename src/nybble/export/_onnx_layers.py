"""What stands for quantized layers while ONNX's exporter traces a model: the same product between Q and DQ nodes.

Codes are buffers called ``codes``, in a type that torch has; the file's own type is given to them afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nybble.export._onnx_weights import FLOATS, RANGES, Coded, coded
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.conv import QuantConv
from nybble.nn.embedding import QuantEmbedding
from nybble.nn.layer import QuantLayer
from nybble.nn.packed import Packed
from nybble.nn.swap import set_module
from nybble.qtensor import dense

OPSET = 21
_TORCH: dict[str, torch.dtype] = {"INT": torch.int8, "UINT": torch.uint8} | {
    onnx: getattr(torch, name) for name, onnx in FLOATS.items()
}


def held_in(kind: str) -> torch.dtype:
    """What torch keeps codes of one of ONNX's types in."""
    return _TORCH[kind.rstrip("48") if kind in RANGES else kind]


def _node(kind: str, inputs: tuple[Tensor | None, ...], dtype: torch.dtype, shape: Any, **attributes: Any) -> Tensor:
    found: Tensor = torch.onnx.ops.symbolic(kind, inputs, attributes, dtype=dtype, shape=shape)
    return found


def _codes_of(codes: Tensor, kind: str) -> Tensor:
    dtype = held_in(kind)
    return codes.to(dtype) if kind in RANGES else codes.view(dtype)


class Rounded(nn.Module):
    """``DequantizeLinear(QuantizeLinear(x))``, with a calibrated scale, or that of each tensor or row.

    Signed codes are written 128 higher as uint8, the same values: on x86 onnxruntime (1.32) has integer products of
    uint8 inputs alone, and makes such ones of int8 only where a single layer reads them.

    Args:
        filled: the quantizer; :func:`nybble.export._onnx_weights.check_activation` let it pass.
        signed: write int8.
    """

    def __init__(self, filled: ActivationQuantizer, signed: bool = False) -> None:
        super().__init__()
        quantizer, params = filled.quantizer, filled.params()
        fmt = quantizer.format
        self.absmax, self.by_row = fmt.absmax, str(quantizer.granularity) == "token"
        # A type saturates at its own ends only: int8 leaves -128 out, int4 has eight bits here.
        self.kind = FLOATS.get(fmt.name) or ("INT8" if signed and fmt.min < 0 else "UINT8")
        shift = 128 if self.kind == "UINT8" and fmt.min < 0 else 0
        whole = fmt.name in FLOATS or (fmt.min + shift, fmt.max + shift) == RANGES[self.kind]
        self.ends = None if whole else (fmt.min, fmt.max)
        zero = None if params is None or params.zero_point is None else dense(params.zero_point).reshape(())
        if zero is not None and self.ends is not None:
            self.ends = (self.ends[0] - float(zero), self.ends[1] - float(zero))
        scale = None if params is None or params.scale is None else dense(params.scale).reshape(())  # type: ignore[arg-type]
        self.register_buffer("scale", scale)
        empty = torch.zeros((), dtype=torch.int16 if self.kind in RANGES else torch.uint8)
        moved = empty + shift if zero is None else zero.to(torch.int16) + shift
        self.register_buffer("zero_point", _codes_of(moved, self.kind))

    def forward(self, x: Tensor) -> Tensor:
        """As the quantizer."""
        scale: Any = self.scale
        if scale is not None:
            return self._rounded(x, scale, {})
        if not self.by_row:
            return self._rounded(x, self._measured(x.abs().flatten().amax(0)), {})
        rows = x.reshape(-1, x.shape[-1])
        scales = self._measured(rows.abs().amax(1))
        return self._rounded(rows, scales, {"axis": 0}).reshape(x.shape)

    def _measured(self, amax: Tensor) -> Tensor:
        scale = amax / self.absmax
        return torch.where(scale == 0, torch.ones_like(scale), scale)

    def _rounded(self, x: Tensor, scale: Tensor, axis: dict[str, int]) -> Tensor:
        zero: Any = self.zero_point
        if axis:
            zero = zero.expand(scale.shape).clone() if self.kind in RANGES else zero
        if self.ends is not None and self.scale is not None:  # measured scales leave nothing beyond the ends
            x = _node("Clip", (x, *(end * scale for end in self.ends)), x.dtype, x.shape)
        codes = _node("QuantizeLinear", (x, scale, zero), held_in(self.kind), x.shape, **axis)
        return _node("DequantizeLinear", (codes, scale, zero), torch.float32, x.shape, **axis)


class Weight(nn.Module):
    """``DequantizeLinear`` of constant codes.

    Args:
        found: the matrix [out, in].
        shape: of the convolution that it is of; None for a linear layer, whose file has it as [in, out].
    """

    def __init__(self, found: Coded, shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        block = found.form.block
        self.kind, self.shape, self.turned = found.form.kind, found.codes.shape, shape is None
        self.late = tuple(shape) if shape is not None and block > 0 else None
        codes, scale = _codes_of(found.codes, self.kind), found.scale
        zero = None if found.zero_point is None else _codes_of(found.zero_point, self.kind)
        if self.turned:
            codes = codes.T
            scale = scale.T if block > 0 else scale
            zero = zero.T if block > 0 and zero is not None else zero
        elif block <= 0 and shape is not None:
            codes = codes.reshape(shape)
        rows, columns = (1, 0) if self.turned else (0, 1)
        self.where = {"axis": columns, "block_size": block} if block > 0 else {"axis": rows} if block == 0 else {}
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("zero_point", None if zero is None else zero.contiguous())

    def forward(self) -> Tensor:
        """[in, out] of a linear layer, a convolution's own shape."""
        codes: Any = self.codes
        given: Any = tuple(part for part in (codes, self.scale, self.zero_point) if part is not None)
        found = _node("DequantizeLinear", given, torch.float32, codes.shape, **self.where)
        return found if self.late is None else found.reshape(self.late)


class Linear(nn.Module):
    """Stands for a quantized linear layer or convolution; ``signed``: of :class:`Rounded`."""

    def __init__(self, layer: QuantLayer, signed: bool = False) -> None:
        super().__init__()
        conv = isinstance(layer, QuantConv)
        self.geometry = layer.geometry if isinstance(layer, QuantConv) else None
        shape = layer.geometry.shape if isinstance(layer, QuantConv) else None
        held = layer.weight
        self.weight: Any = Weight(coded(held.qtensor()), shape) if isinstance(held, Packed) else held
        self.bias = layer.bias
        self.inputs, self.outputs = (None if q is None else Rounded(q, signed) for q in (layer.inputs, layer.outputs))
        if conv:  # which MobileNetV2 reads of its convolutions
            self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation

    def forward(self, x: Tensor) -> Tensor:
        """As the quantized layer's."""
        x = x if self.inputs is None else self.inputs(x)
        weight = self.weight() if isinstance(self.weight, Weight) else self.weight
        if self.geometry is not None:
            y = self.geometry.apply(x, weight, self.bias)
        elif isinstance(self.weight, Weight):
            y = x @ weight if self.bias is None else x @ weight + self.bias
        else:
            y = nn.functional.linear(x, weight, self.bias)
        return y if self.outputs is None else self.outputs(y)


class Embedding(nn.Module):
    """Stands for a quantized embedding: codes are looked up, and rows of them dequantized."""

    def __init__(self, layer: QuantEmbedding) -> None:
        super().__init__()
        found = coded(layer.weight.qtensor())
        self.scale = layer.scale
        self.table = Weight(found, tuple(layer.weight.shape))
        self.by_rows = found.form.block <= 0 and found.form.kind in ("INT8", "UINT8")

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., width]."""
        if self.by_rows:
            table: Any = self.table
            codes = table.codes[ids].float()
            scale, zero = table.scale, table.zero_point
            if table.where:  # a scale a row
                scale, zero = scale[ids][..., None], None if zero is None else zero[ids][..., None]
            rows = (codes if zero is None else codes - zero.float()) * scale
        else:
            rows = nn.functional.embedding(ids, self.table())
        return rows if self.scale is None else self.scale.times(rows)


def put_nodes(model: nn.Module, signed: bool = False) -> tuple[list[str], dict[str, Weight]]:
    """Replace a model's quantized modules; returns their names, and the weights of those that have quantized ones.

    ``signed``: of :class:`Rounded`.
    """
    layers: list[str] = []
    found: dict[str, Weight] = {}
    for name, module in list(model.named_modules()):
        made: Any = None
        if isinstance(module, QuantLayer):
            made = Linear(module, signed)
            if isinstance(made.weight, Weight):
                found[name] = made.weight
        elif isinstance(module, QuantEmbedding):
            made = Embedding(module)
            found[name] = made.table
        if made is not None:
            layers.append(name)
            set_module(model, name, made.eval())
    return layers, found
