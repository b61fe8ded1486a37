"""Codes of one format with a scale a block: every format, granularity and nesting of scales."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import FileError
from nybble.formats import NumberFormat, get_format
from nybble.granularity import Granularity, make_granularity
from nybble.ops.rounding import decode
from nybble.ops.tables import table_decode
from nybble.packing import get_layout
from nybble.qtensor import (
    Factored,
    Inverse,
    QTensor,
    QuantParams,
    ScaleLike,
    Spec,
    block_view,
    from_spec,
    named_tensors,
    scale_blocks,
    stored_tensor,
    sub_tensors,
    validate_all,
)


@dataclass(frozen=True)
class BlockQTensor(QTensor):
    """Codes of one format with a scale a block.

    Attributes:
        format: of the codes. granularity: who shares a scale. shape: of the tensor.
        codes: uint8, packed by ``layout`` in row-major order of the tensor.
        params: scale, zero point, offset, learned thresholds and grid.
    """

    format: NumberFormat
    granularity: Granularity
    shape: tuple[int, ...]
    codes: Tensor
    params: QuantParams
    layout: str = "dense"
    kind = "block"

    def unpacked(self) -> Tensor:
        """uint8 codes (int32 above 8 bits) of shape ``self.shape``."""
        flat = get_layout(self.layout).unpack(self.codes, self.format.bits, math.prod(self.shape))
        codes: Tensor = flat.view(self.shape)
        return codes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:  # noqa: D102
        from nybble.qtensor._by_rows import by_rows

        quick = by_rows(self, dtype)
        return self._dequantized(dtype) if quick is None else quick

    def _dequantized(self, dtype: torch.dtype) -> Tensor:
        values: Tensor = (
            decode(self.unpacked(), self.format.name)
            if self.params.grid is None
            else table_decode(self.unpacked(), self.params.grid)
        )
        if self.params.scale is None and self.params.offset is None and self.params.zero_point is None:
            return values.to(dtype)
        blocks = self.granularity.to_blocks(values)
        if self.params.zero_point is not None:
            blocks = blocks - block_view(self.params.zero_point, self.granularity, self.shape)
        if self.params.scale is not None:
            blocks = scale_blocks(blocks, self.params.scale, self.granularity, self.shape)
        if self.params.offset is not None:
            blocks = blocks + block_view(self.params.offset, self.granularity, self.shape)
        return self.granularity.from_blocks(blocks, self.shape).to(dtype)

    def cast(self, target: NumberFormat | str, granularity: Granularity | str = "channel") -> BlockQTensor:
        """The same values in a wider float whose codes take up the powers of two by which the scales differ.

        So units for FP8 read FP4 weights (ZeroQuant-FP): exponents are shifted, and one real number a row is applied
        behind the product.

        Args:
            target: a float that has all values of the format.
            granularity: who shares a real number, here the largest of its scales: no more than what ``scale_format``
                lets share one.

        Returns:
            codes in ``target``, float32 scales; ``dequantize()`` is this tensor's, bit for bit (but where a product of
            float32 underflows).

        Raises:
            FormatError: :func:`nybble.ops.casting.shifted_codes`.
            SchemeError: ratios that are no powers of two; zero points, offsets or a learned grid.
        """
        from nybble.qtensor._cast import cast

        return cast(self, target, granularity)

    def _parts(self) -> Iterator[tuple[str, Tensor | QTensor, str]]:
        """Name, value and role of everything beside the codes."""
        scale = self.params.scale
        if isinstance(scale, Factored):
            yield from ((f"scale.{i}", factor, "scales") for i, factor in enumerate(scale.factors))
        elif isinstance(scale, Inverse):
            yield "scale.divisor", scale.divisor, "scales"
        elif scale is not None:
            yield "scale", scale, "scales"
        if self.params.zero_point is not None:
            yield "zero_point", self.params.zero_point, "offsets"
        if self.params.offset is not None:
            yield "offset", self.params.offset, "offsets"
        if self.params.thresholds is not None:
            yield "thresholds", self.params.thresholds, "tables"
        if self.params.grid is not None:
            yield "grid", self.params.grid, "tables"

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        found = {"codes": self.codes}
        for name, value, _ in self._parts():
            found |= {name: value} if isinstance(value, Tensor) else named_tensors(name, value)
        return found

    def roles(self) -> dict[str, str]:  # noqa: D102
        found = {"codes": "codes"}
        for name, value, role in self._parts():
            found |= {name: role} if isinstance(value, Tensor) else {f"{name}.{k}": role for k in value.tensors()}
        return found

    def spec(self) -> Spec:  # noqa: D102
        found: Spec = {
            "kind": self.kind,
            "format": self.format.name,
            "granularity": str(self.granularity),
            "shape": list(self.shape),
        }
        if self.layout != "dense":
            found["layout"] = self.layout
        scale = self.params.scale
        if isinstance(scale, Factored):
            found["scale"] = {
                "kind": "factored",
                "combine": scale.combine,
                "factors": [_part_spec(f) for f in scale.factors],
            }
        elif isinstance(scale, Inverse):
            found["scale"] = {"kind": "inverse", "divisor": _part_spec(scale.divisor)}
        elif scale is not None:
            found["scale"] = _part_spec(scale)
        for name in ("zero_point", "offset", "thresholds", "grid"):
            value = getattr(self.params, name)
            if value is not None:
                found[name] = _part_spec(value)
        return found

    def to(self, device: torch.device | str) -> BlockQTensor:  # noqa: D102
        rebuilt = from_spec(self.spec(), {k: t.to(device) for k, t in self.tensors().items()})
        assert isinstance(rebuilt, BlockQTensor)
        return rebuilt

    def validate(self) -> None:
        """Every code of a format means something; what is nested may hold more than codes."""
        validate_all({name: value for name, value, _ in self._parts()})

    @staticmethod
    def rebuild(spec: Spec, tensors: Mapping[str, Tensor]) -> BlockQTensor:
        """From :meth:`spec` and :meth:`tensors`."""
        granularity = make_granularity(str(spec["granularity"]))
        fmt, shape = get_format(spec["format"]), tuple(int(n) for n in spec["shape"])
        layout = str(spec.get("layout", "dense"))
        expected = get_layout(layout).size(math.prod(shape), fmt.bits)
        codes = stored_tensor(tensors, "codes")
        if codes.dtype != torch.uint8 or codes.shape != (expected,):
            raise FileError(
                f"codes of a {fmt.name} tensor {list(shape)} are {expected} bytes; "
                f"found {list(codes.shape)} of {codes.dtype}."
            )
        scale: ScaleLike | None = None
        scale_kind = spec["scale"].get("kind") if "scale" in spec else None
        if scale_kind == "factored":
            parts = [_part(f"scale.{i}", s, tensors) for i, s in enumerate(spec["scale"]["factors"])]
            scale = Factored(tuple(parts), str(spec["scale"]["combine"]))
        elif scale_kind == "inverse":
            divisor = _part("scale.divisor", spec["scale"]["divisor"], tensors)
            if not isinstance(divisor, Tensor):
                raise FileError("the divisor of an inverse scale is a plain tensor.")
            _check_count("scale.divisor", divisor, granularity, shape)
            scale = Inverse(divisor)
        elif "scale" in spec:
            scale = _part("scale", spec["scale"], tensors)
            _check_count("scale", scale, granularity, shape)
        rest: dict[str, Any] = {
            k: _part(k, spec[k], tensors) for k in ("zero_point", "offset", "thresholds", "grid") if k in spec
        }
        for name in ("zero_point", "offset"):
            if name in rest and (name == "zero_point" or rest[name].shape != (1,)):  # one mean for all (center=mean)
                _check_count(name, rest[name], granularity, shape)
        grid = rest.get("grid")
        if grid is not None and (grid.shape != (2**fmt.bits,) or grid.dtype != torch.float32):
            raise FileError(
                f"grid: a learned grid in place of {fmt.name} is {2**fmt.bits} values of float32, one for each code; "
                f"found {list(grid.shape)} of {grid.dtype}."
            )
        return BlockQTensor(fmt, granularity, shape, codes, QuantParams(scale, **rest), layout)


def _part_spec(value: Tensor | QTensor) -> Spec:
    if isinstance(value, QTensor):
        return value.spec()
    return {"kind": "plain", "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}


def _part(name: str, spec: Spec, tensors: Mapping[str, Tensor]) -> Tensor | QTensor:
    if spec.get("kind") != "plain":
        return from_spec(spec, sub_tensors(tensors, name))
    value = stored_tensor(tensors, name)
    if list(value.shape) != list(spec["shape"]) or str(value.dtype) != f"torch.{spec['dtype']}":
        raise FileError(f"{name} should be {spec['dtype']} {spec['shape']}; found {value.dtype} {list(value.shape)}.")
    return value


def _check_count(name: str, value: Tensor | QTensor, granularity: Granularity, shape: tuple[int, ...]) -> None:
    expected = math.prod(granularity.scale_shape(shape))
    if math.prod(value.shape) != expected:
        raise FileError(
            f"{name}: {granularity} of a tensor {list(shape)} needs {expected} values; found {math.prod(value.shape)}."
        )


PART = BlockQTensor
