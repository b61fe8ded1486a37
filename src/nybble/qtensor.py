"""Quantized tensors: plain tensors in a record, no tensor subclass.

``x_hat = scale * (decode(code) - zero_point)``, or ``scale * decode(code) + offset`` with an offset in the units of x. Scale, zero point and
offset are each a plain tensor *or themselves a QTensor*: NVFP4 (E4M3 scales over one float32), double quantization (dynamic
8-bit scales per 256 blocks plus a mean) and 4-bit zero points are data, not code.

==============  ================================================================================
BlockQTensor    codes of one format, a scale a block
VectorQTensor   indices into a code book of vectors
SplitQTensor    columns in different quantizers, or left in 16 bits (outlier columns)
LowRankSum      a QTensor plus A @ B (low-rank compensation)
==============  ================================================================================

A QTensor is saved as its tensors under dotted names (``weight.codes``, ``weight.scale.codes`` ...) and a JSON spec that names everything else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import FileError, NybbleError
from nybble.formats import NumberFormat, get_format
from nybble.granularity import Granularity, parse_granularity
from nybble.ops.rounding import decode
from nybble.packing import get_layout

Spec = dict[str, Any]


class QTensor(ABC):
    """A tensor in few bits."""

    kind: str
    shape: tuple[int, ...]

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values: calculated in float32, then cast to ``dtype``; shape ``self.shape``."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, under names relative to this tensor."""

    @abstractmethod
    def spec(self) -> Spec:
        """What else is needed to rebuild it, as JSON; the key ``kind`` names the class."""

    @abstractmethod
    def roles(self) -> dict[str, str]:
        """For each name of :meth:`tensors`: codes, scales, offsets, tables or unquantized."""

    @abstractmethod
    def to(self, device: torch.device | str) -> QTensor:
        """The same on another device."""

    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def bits_per_element(self) -> float:
        """Stored bits over elements; scales, tables and padding included."""
        return 8 * self.nbytes() / max(1, math.prod(self.shape))

    def bytes_by_role(self) -> dict[str, int]:
        """Bytes as :meth:`roles` names them; what packing rounds up counts as ``padding``."""
        total: dict[str, int] = {}
        roles = self.roles()
        for name, tensor in self.tensors().items():
            total[roles[name]] = total.get(roles[name], 0) + tensor.numel() * tensor.element_size()
        for role, count in self.padding_bytes().items():
            total[role] -= count
            total["padding"] = total.get("padding", 0) + count
        return total

    def padding_bytes(self) -> dict[str, int]:
        """Whole bytes that a layout wastes, by role; dense layouts waste none."""
        return {}


@dataclass(frozen=True)
class Factored:
    """A scale made of factors that broadcast against the tensor, combined by ``product`` or ``min``.

    ``product``: a channel scale times a column factor 2^-s_j (LLM-FP4), an outer product (PTQ1.61). ``min``: rank-1 normalisation of
    optimizer states. The first factor may have the granularity's scale shape; all others broadcast. Only :meth:`expand` knows.
    """

    factors: tuple[Tensor | QTensor, ...]
    combine: str = "product"

    def expand(self, granularity: Granularity, shape: tuple[int, ...]) -> Tensor:
        """float32, broadcastable to ``shape``."""
        result: Tensor | None = None
        for factor in self.factors:
            value = dense(factor)
            if not broadcasts(value.shape, shape):
                value = granularity.expand(value, shape)
            if result is None:
                result = value
            else:
                result = result * value if self.combine == "product" else torch.minimum(result, value)
        assert result is not None
        return result


ScaleLike = Tensor | QTensor | Factored


@dataclass(frozen=True)
class QuantParams:
    """What :meth:`nybble.quantizer.Quantizer.fit` finds, or a solver or training supplies.

    Attributes:
        scale: of the granularity's scale shape, or factored; None means 1.
        zero_point: integers of the scale's shape, in the units of codes; None means 0.
        offset: of the scale's shape, in the units of x; None means 0.
        thresholds: float32, ascending, in the units of x / scale: learned decision points instead of a tie rule (N2UQ); one
            list for the whole tensor.
    """

    scale: ScaleLike | None
    zero_point: Tensor | QTensor | None = None
    offset: Tensor | QTensor | None = None
    thresholds: Tensor | None = None


def dense(value: Tensor | QTensor) -> Tensor:
    """A plain float32 tensor of either."""
    return value.dequantize() if isinstance(value, QTensor) else value.float()


def broadcasts(shape: torch.Size | tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether ``shape`` has as many dimensions as ``to`` and each is 1 or the same."""
    return len(shape) == len(to) and all(a in (1, b) for a, b in zip(shape, to, strict=True))


def block_view(value: ScaleLike, granularity: Granularity, shape: tuple[int, ...]) -> Tensor:
    """A scale (or zero point, offset) against ``granularity.to_blocks``: float32 [blocks, 1], or [blocks, elements] if factored."""
    if isinstance(value, Factored):
        return granularity.to_blocks(value.expand(granularity, shape).expand(shape))
    return dense(value).reshape(-1, 1)


@dataclass(frozen=True)
class BlockQTensor(QTensor):
    """Codes of one format with a scale a block.

    Attributes:
        format: of the codes. granularity: who shares a scale. shape: of the tensor.
        codes: uint8, packed by ``layout`` in row-major order of the tensor.
        params: scale, zero point, offset.
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
        return flat.view(self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:  # noqa: D102
        values = decode(self.unpacked(), self.format.name)
        if self.params.scale is None and self.params.offset is None and self.params.zero_point is None:
            return values.to(dtype)
        blocks = self.granularity.to_blocks(values)
        if self.params.zero_point is not None:
            blocks = blocks - block_view(self.params.zero_point, self.granularity, self.shape)
        if self.params.scale is not None:
            blocks = blocks * block_view(self.params.scale, self.granularity, self.shape)
        if self.params.offset is not None:
            blocks = blocks + block_view(self.params.offset, self.granularity, self.shape)
        return self.granularity.from_blocks(blocks, self.shape).to(dtype)

    def _parts(self) -> Iterator[tuple[str, Tensor | QTensor, str]]:
        """Name, value and role of everything beside the codes."""
        scale = self.params.scale
        if isinstance(scale, Factored):
            yield from ((f"scale.{i}", factor, "scales") for i, factor in enumerate(scale.factors))
        elif scale is not None:
            yield "scale", scale, "scales"
        if self.params.zero_point is not None:
            yield "zero_point", self.params.zero_point, "offsets"
        if self.params.offset is not None:
            yield "offset", self.params.offset, "offsets"
        if self.params.thresholds is not None:
            yield "thresholds", self.params.thresholds, "tables"

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        found = {"codes": self.codes}
        for name, value, _ in self._parts():
            found |= {name: value} if isinstance(value, Tensor) else {f"{name}.{k}": t for k, t in value.tensors().items()}
        return found

    def roles(self) -> dict[str, str]:  # noqa: D102
        found = {"codes": "codes"}
        for name, value, role in self._parts():
            found |= {name: role} if isinstance(value, Tensor) else {f"{name}.{k}": role for k in value.tensors()}
        return found

    def spec(self) -> Spec:  # noqa: D102
        found: Spec = {"kind": self.kind, "format": self.format.name, "granularity": str(self.granularity), "shape": list(self.shape)}
        if self.layout != "dense":
            found["layout"] = self.layout
        scale = self.params.scale
        if isinstance(scale, Factored):
            found["scale"] = {"kind": "factored", "combine": scale.combine, "factors": [_part_spec(f) for f in scale.factors]}
        elif scale is not None:
            found["scale"] = _part_spec(scale)
        for name in ("zero_point", "offset", "thresholds"):
            value = getattr(self.params, name)
            if value is not None:
                found[name] = _part_spec(value)
        return found

    def to(self, device: torch.device | str) -> BlockQTensor:  # noqa: D102
        rebuilt = from_spec(self.spec(), {k: t.to(device) for k, t in self.tensors().items()})
        assert isinstance(rebuilt, BlockQTensor)
        return rebuilt

    @staticmethod
    def rebuild(spec: Spec, tensors: Mapping[str, Tensor]) -> BlockQTensor:
        """From :meth:`spec` and :meth:`tensors`."""
        words = dict(word.split("=", 1) if "=" in word else (word, "") for word in str(spec["granularity"]).split())
        granularity = parse_granularity(words)
        if granularity is None or words:
            raise FileError(f"unknown granularity {spec['granularity']!r}.")
        fmt, shape = get_format(spec["format"]), tuple(int(n) for n in spec["shape"])
        layout = str(spec.get("layout", "dense"))
        expected = get_layout(layout).size(math.prod(shape), fmt.bits)
        codes = _tensor(tensors, "codes")
        if codes.dtype != torch.uint8 or codes.shape != (expected,):
            raise FileError(f"codes of a {fmt.name} tensor {list(shape)} are {expected} bytes; found {list(codes.shape)} of {codes.dtype}.")
        scale: ScaleLike | None = None
        if isinstance(spec.get("scale"), dict) and spec["scale"].get("kind") == "factored":
            parts = [_part(f"scale.{i}", s, tensors) for i, s in enumerate(spec["scale"]["factors"])]
            scale = Factored(tuple(parts), str(spec["scale"]["combine"]))
        elif "scale" in spec:
            scale = _part("scale", spec["scale"], tensors)
            _check_count("scale", scale, granularity, shape)
        rest: dict[str, Any] = {k: _part(k, spec[k], tensors) for k in ("zero_point", "offset", "thresholds") if k in spec}
        for name in ("zero_point", "offset"):
            if name in rest:
                _check_count(name, rest[name], granularity, shape)
        return BlockQTensor(fmt, granularity, shape, codes, QuantParams(scale, **rest), layout)


def _part_spec(value: Tensor | QTensor) -> Spec:
    if isinstance(value, QTensor):
        return value.spec()
    return {"kind": "plain", "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}


def _part(name: str, spec: Spec, tensors: Mapping[str, Tensor]) -> Tensor | QTensor:
    if spec.get("kind") != "plain":
        return from_spec(spec, {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")})
    value = _tensor(tensors, name)
    if list(value.shape) != list(spec["shape"]) or str(value.dtype) != f"torch.{spec['dtype']}":
        raise FileError(f"{name} should be {spec['dtype']} {spec['shape']}; found {value.dtype} {list(value.shape)}.")
    return value


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise FileError(f"the tensor {name!r} is missing; found {', '.join(sorted(tensors)) or 'none'}.")
    return tensors[name]


def _check_count(name: str, value: Tensor | QTensor, granularity: Granularity, shape: tuple[int, ...]) -> None:
    expected = math.prod(granularity.scale_shape(shape))
    if math.prod(value.shape) != expected:
        raise FileError(f"{name}: {granularity} of a tensor {list(shape)} needs {expected} values; found {math.prod(value.shape)}.")


def from_spec(spec: Spec, tensors: Mapping[str, Tensor]) -> QTensor:
    """Rebuild a QTensor from its :meth:`QTensor.spec` and :meth:`QTensor.tensors`.

    Raises:
        FileError: the spec is malformed, or a tensor is missing or of the wrong shape or dtype; never anything else.
    """
    from nybble import qtensor_kinds

    try:
        kind = spec["kind"]
        classes: dict[str, Any] = {"block": BlockQTensor} | qtensor_kinds.KINDS
        if kind not in classes:
            raise FileError(f"unknown kind of quantized tensor {kind!r}; known: {', '.join(classes)}.")
        rebuilt: QTensor = classes[kind].rebuild(spec, tensors)
        return rebuilt
    except NybbleError as error:
        raise FileError(str(error)) from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError, OverflowError) as error:
        raise FileError(f"malformed description of a quantized tensor ({type(error).__name__}: {error}).") from error
