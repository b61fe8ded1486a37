"""The bytes of compressed-tensors' formats, from a tensor's own: codes keep their value, nothing is rounded.

=====================  ============================================================================================
pack-quantized         ``weight_packed`` int32: offset-binary codes, a little-endian stream a row, padded to a word;
                       ``weight_zero_point`` the same down the columns; ``weight_shape`` int64 [2]
int-, float-,          ``weight`` int8 or float8_e4m3fn
naive-quantized
nvfp4-pack-quantized   ``weight_packed`` uint8, low nibble first; ``weight_scale`` float8_e4m3fn;
                       ``weight_global_scale`` float32 [1], which the scales are *divided* by
mxfp4-, mxfp6-pack-,   ``weight_packed`` uint8 (``weight`` float8_e4m3fn of mxfp8), ``weight_scale`` uint8 exponents
mxfp8-quantized
=====================  ============================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nybble.core.errors import FileError
from nybble.core.tensorfile import Planned, safetensors_name
from nybble.export._reciprocal import reciprocals
from nybble.export._source import Layer, Source
from nybble.models.sources.layouts._ct_args import Args
from nybble.models.sources.layouts._pieces import flipped
from nybble.packing import get_layout
from nybble.qtensor import Inverse, dense
from nybble.qtensor._rows import take_rows
from nybble.qtensor.block import BlockQTensor

_E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Matrix:
    """Rows of a layer's matrix that are written under a name of their own.

    Attributes:
        source: where it is read. layer, prefix: which. rows: which of its rows; None for all, in order.
        args: its QuantizationArgs. form: the format of the files.
        divisor: of NVFP4's scales, shared with siblings; None: its own.
    """

    source: Source
    layer: Layer
    prefix: str
    rows: tuple[int, ...] | None
    args: Args
    form: str
    divisor: float | None = None

    @property
    def empty(self) -> BlockQTensor:
        """On the meta device, all rows."""
        found = self.layer.weights[self.prefix]
        assert isinstance(found, BlockQTensor)
        return found

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        rows, columns = self.empty.shape
        return (rows if self.rows is None else len(self.rows)), columns

    def read(self) -> BlockQTensor:
        """With its values."""
        found = self.source.weight(self.layer, self.prefix)
        assert isinstance(found, BlockQTensor)
        return found if self.rows is None else take_rows(found, self.rows)

    def tensors(self) -> dict[str, Planned]:
        """What is written, by name beside the module's."""
        bits, (rows, columns) = self.empty.format.bits, self.shape
        if self.form == "pack-quantized":
            return self._packed_integers(bits, rows, columns)
        found = {"weight_scale": self._scale()}
        if self.form in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized"):
            found["weight_packed"] = self._codes("U8", (rows, columns * bits // 8))
            if self.form.startswith("nv"):
                found["weight_global_scale"] = _made("F32", (1,), lambda: torch.tensor([self._divisor()]))
        elif self.args["type"] == "float":
            found["weight"] = self._codes("F8_E4M3", (rows, columns))
        else:
            found["weight"] = _made("I8", (rows, columns), lambda: signed(self.read()))
            if not self.args["symmetric"]:
                shape = self._scale_shape()
                found["weight_zero_point"] = _made("I8", shape, lambda: signed(self._zero_point()).view(shape))
        return found

    def _packed_integers(self, bits: int, rows: int, columns: int) -> dict[str, Planned]:
        words = math.ceil(columns * bits / 32)
        found = {
            "weight_packed": self._as_filed(bits) or _made("I32", (rows, words), lambda: packed_rows(self.read())),
            "weight_scale": self._scale(),
            "weight_shape": _made("I64", (2,), lambda: torch.tensor([rows, columns], dtype=torch.int64)),
        }
        if not self.args["symmetric"]:
            shape = self._scale_shape()
            if self.args["strategy"] in ("group", "channel"):
                down = (math.ceil(rows * bits / 32), shape[1])
                found["weight_zero_point"] = _made("I32", down, lambda: packed_columns(self._zero_point(), shape))
            else:
                found["weight_zero_point"] = _made("I8", shape, lambda: signed(self._zero_point()).view(shape))
        return found

    def _as_filed(self, bits: int) -> Planned | None:
        """The words of files in the same form, where nothing is between the rows; None else."""
        signed_as_there = self.empty.format.name == f"int{bits}_full" and self.empty.layout == "dense"
        if self.rows is not None or not signed_as_there or self.shape[1] * bits % 32:
            return None
        return self.source.filed(self.layer, self.prefix, self.form, "weight_packed")

    def _divisor(self) -> float:
        own = divisor_of(self.source, self.layer, self.prefix)
        found = own if self.divisor is None else self.divisor
        assert found is not None  # else it was refused
        return found

    def _ratio(self) -> float:
        """What NVFP4's scales are multiplied with to go with the shared divisor; a power of two."""
        if self.divisor is None or not self.form.startswith("nv"):
            return 1.0
        own = divisor_of(self.source, self.layer, self.prefix)
        assert own is not None
        return self.divisor / own

    def _codes(self, dtype: str, shape: tuple[int, int]) -> Planned:
        """The bytes as they are: where all rows are wanted, of the file."""
        if self.rows is None and self.empty.layout == "dense":
            return self.source.copied(f"{self.prefix}.codes").recast(shape, dtype)
        kind = _E4M3 if dtype == "F8_E4M3" else torch.uint8
        return _made(dtype, shape, lambda: self.read().codes.view(shape).view(kind))

    def _scale_shape(self) -> tuple[int, ...]:
        rows, columns = self.shape
        name = self.args["strategy"]
        if name == "tensor":
            return (1,)
        if name == "channel":
            return rows, 1
        if name == "block":
            high, wide = self.args["block_structure"]
            return math.ceil(rows / high), columns // wide
        return rows, columns // int(self.args["group_size"])

    def _scale(self) -> Planned:
        scale, shape = self.empty.params.scale, self._scale_shape()
        nested = isinstance(scale, BlockQTensor) and scale.layout == "dense"
        if self.form[:2] in ("nv", "mx") and nested:
            dtype, kind = ("F8_E4M3", _E4M3) if self.form.startswith("nv") else ("U8", torch.uint8)
            ratio = self._ratio()
            if self.rows is None and ratio == 1:
                return self.source.copied(f"{self.prefix}.scale.codes").recast(shape, dtype)
            return _made(dtype, shape, lambda: moved(scale_of(self.read()).codes.view(kind), ratio).view(shape))
        # The library multiplies in the dtype that is stored; only the model's own, or float32, gives nybble's values.
        if isinstance(scale, Tensor) and scale.dtype in (self.source.dtype, torch.float32):
            if self.rows is None:
                return self.source.copied(f"{self.prefix}.scale").recast(shape)
            return _made(str(safetensors_name(scale.dtype)), shape, lambda: self._plain_scale().view(shape))
        return _made("F32", shape, lambda: self._plain_scale().float().reshape(shape))

    def _plain_scale(self) -> Tensor:
        scale = self.read().params.scale
        if scale is None:
            return torch.ones(self._scale_shape(), dtype=torch.float32)
        if isinstance(scale, Tensor):
            return scale
        assert isinstance(scale, BlockQTensor)
        return dense(scale)

    def _zero_point(self) -> BlockQTensor:
        found = self.read().params.zero_point
        assert isinstance(found, BlockQTensor)
        return found


def _made(dtype: str, shape: Sequence[int], make: Callable[[], Tensor]) -> Planned:
    return Planned(dtype=dtype, shape=tuple(shape), bytes_from=make)


def scale_of(tensor: BlockQTensor) -> BlockQTensor:
    """Scales that are quantized themselves."""
    scale = tensor.params.scale
    assert isinstance(scale, BlockQTensor)
    return scale


def signed(tensor: BlockQTensor) -> Tensor:
    """Integers as int8, of the tensor's shape; unsigned ones less half their range."""
    codes, half = tensor.unpacked().to(torch.int16), 1 << (tensor.format.bits - 1)
    if not tensor.format.name.startswith("u"):
        codes = codes ^ half
    return (codes - half).to(torch.int8)


def packed_rows(tensor: BlockQTensor) -> Tensor:
    """int32 [rows, words]: what is stored with its sign bits flipped, each row on words of its own."""
    rows, columns = tensor.shape
    bits = tensor.format.bits
    flip = not tensor.format.name.startswith("u")
    if columns * bits % 32 == 0 and tensor.layout == "dense":
        data = flipped(tensor.codes, bits) if flip else tensor.codes
        return data.view(torch.int32).view(rows, -1)
    codes = tensor.unpacked()
    return _words(codes ^ (1 << (bits - 1)) if flip else codes, bits)


def packed_columns(tensor: BlockQTensor, shape: Sequence[int]) -> Tensor:
    """int32 [words, groups]: zero points, each column on words of its own."""
    bits, codes = tensor.format.bits, tensor.unpacked().view(tuple(shape))
    flip = 0 if tensor.format.name.startswith("u") else 1 << (bits - 1)
    return _words((codes ^ flip).T.contiguous(), bits).T.contiguous()


def _words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns] -> int32 [rows, words]."""
    rows, columns = codes.shape
    wide = functional.pad(codes, (0, -columns % 32)).reshape(-1)
    words = get_layout("dense").pack(wide, bits).view(torch.int32).view(rows, -1)
    return words[:, : math.ceil(columns * bits / 32)].contiguous()


# ------------------------------------------------------------------------------------------------- NVFP4's global scale
def exact_divisor(outer: Tensor | Inverse) -> float | None:
    """What E4M3 scales are divided by to give the values that they have; None where no float32 does.

    A divisor is kept as one. Of a factor it is the reciprocal, exactly so of a power of two; else that or a neighbour
    of it under which every code and scale gives the same value in bfloat16, in which the library calculates.
    """
    if isinstance(outer, Inverse):
        return outer.divisor.float().reshape(-1)[0].item()
    factor = outer.float().reshape(1)
    scales = torch.arange(1, 127, dtype=torch.uint8).view(_E4M3).float()
    products = torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float32)[:, None]
    wanted = (products * (scales * factor)).bfloat16()
    fits = (c for c in reciprocals(factor) if torch.equal((products * (scales / c)).bfloat16(), wanted))
    return next(fits, None)


def divisor_of(source: Source, layer: Layer, prefix: str) -> float | None:
    """:func:`exact_divisor` of an NVFP4 weight; one number is read, once."""
    key = ("divisor", prefix)
    if key not in source.known:
        source.known[key] = _divisor_of(source, layer, prefix)
    found: float | None = source.known[key]
    return found


def _divisor_of(source: Source, layer: Layer, prefix: str) -> float | None:
    weight = layer.weights[prefix]
    assert isinstance(weight, BlockQTensor)
    outer = scale_of(weight).params.scale
    name = "scale.scale.divisor" if isinstance(outer, Inverse) else "scale.scale"
    value = source.tensor(f"{prefix}.{name}")
    return exact_divisor(Inverse(value) if isinstance(outer, Inverse) else value)


def moved(scales: Tensor, ratio: float) -> Tensor:
    """E4M3 scales times a power of two.

    Raises:
        FileError: one is too small for that.
    """
    if ratio == 1:
        return scales
    wanted = scales.float() * ratio
    found = wanted.to(_E4M3)
    if not torch.equal(found.float(), wanted):
        raise FileError("scales of NVFP4 that can't be brought to the divisor of their siblings.")
    return found


def shared_divisor(source: Source, layers: Sequence[Layer]) -> float | None:
    """The divisor that NVFP4 weights of several layers can have together without a change of any value; None: none."""
    found = [(layer, prefix, divisor_of(source, layer, prefix)) for layer in layers for prefix in layer.weights]
    divisors = {divisor for _, _, divisor in found}
    if None in divisors:
        return None
    least = min(divisor for _, _, divisor in found if divisor is not None)
    for _, prefix, divisor in found:
        assert divisor is not None
        if divisor == least:
            continue
        if math.frexp(divisor)[0] != math.frexp(least)[0]:
            return None
        try:
            moved(source.tensor(f"{prefix}.scale.codes").view(_E4M3), least / divisor)
        except FileError:
            return None
    return least
