"""Quantized tensors: plain tensors in a record, no tensor subclass.

``x_hat = scale * (decode(code) - zero_point)``, or ``scale * decode(code) + offset`` with an offset in the units of x.
Scale, zero point and offset are each a plain tensor *or themselves a QTensor*: NVFP4 (E4M3 scales over one float32),
double quantization (dynamic 8-bit scales per 256 blocks plus a mean) and 4-bit zero points are data, not code.

==============  ================================================================================
BlockQTensor    codes of one format, a scale a block
VectorQTensor   indices into a code book of vectors
SplitQTensor    columns in different quantizers, or left in 16 bits (outlier columns, PTQ1.61)
OuterScaled     a QTensor times factors of its rows and columns (PTQ1.61)
LowRankSum      a QTensor plus A @ B (low-rank compensation)
MixedBits       integers whose width each group has of its own (DiffQ)
==============  ================================================================================

A QTensor is saved as its tensors under dotted names (``weight.codes``, ``weight.scale.codes`` ...) and a JSON spec that
names everything else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import FileError, NybbleError
from nybble.core.registry import Registry
from nybble.granularity import Granularity

Spec = dict[str, Any]
REGISTRY = Registry(
    "nybble.qtensor", "kind of quantized tensor", lambda part: isinstance(part, type) and issubclass(part, QTensor)
)


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

    @staticmethod
    @abstractmethod
    def rebuild(spec: Spec, tensors: Mapping[str, Tensor]) -> QTensor:
        """The inverse of :meth:`spec` and :meth:`tensors`; :func:`from_spec` calls it and names what is wrong.

        Checks shapes and dtypes, never values: it works on the meta device and never waits for another.
        """

    @abstractmethod
    def validate(self) -> None:
        """Check the values that :meth:`rebuild` can't see; once, where tensors come from a file. Waits for the device.

        Raises:
            FileError: a stored number that would be read out of bounds, say.
        """

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

    ``product``: a channel scale times a column factor 2^-s_j (LLM-FP4), an outer product (PTQ1.61). ``min``: rank-1
    normalisation of optimizer states. The first factor may have the granularity's scale shape; all others broadcast.
    Only :meth:`expand` knows.
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


@dataclass(frozen=True)
class Inverse:
    """A scale stored as its reciprocal: ``x_hat = value / divisor``, ``code = round(x * divisor)``.

    Peers keep NVFP4's global scale so.
    """

    divisor: Tensor


ScaleLike = Tensor | QTensor | Factored | Inverse


@dataclass(frozen=True)
class QuantParams:
    """What :meth:`nybble.quantizer.Quantizer.fit` finds, or a solver or training supplies.

    Attributes:
        scale: of the granularity's scale shape, or factored, or its reciprocal; None means 1.
        zero_point: integers of the scale's shape, in the units of codes; None means 0.
        offset: of the scale's shape, in the units of x; None means 0.
        thresholds: float32, ascending, in the units of x / scale: learned decision points instead of a tie rule (N2UQ);
            one list for the whole tensor.
        divisor: what x is divided by where that is not the scale that multiplies back (``raw_scale=true``); not stored.
        grid: float32 [2**bits], the value of each code: a learned code book in place of the format's values.
        scale_params: of the scales' own quantizer, while ``scale`` is raw (float32, not yet stored; see
            :meth:`nybble.quantizer.Quantizer.soften`); None measures them on ``scale``. Not stored: a QTensor has its
            own.
        offset_params: the same for ``offset``.
        shift: float32 [1], or one value for each column of x: what is taken off x before all else and not put back (a
            learned threshold), in the units of x; None means 0. Not stored with codes.
    """

    scale: ScaleLike | None
    zero_point: Tensor | QTensor | None = None
    offset: Tensor | QTensor | None = None
    thresholds: Tensor | None = None
    divisor: Tensor | None = None
    grid: Tensor | None = None
    scale_params: QuantParams | None = None
    offset_params: QuantParams | None = None
    shift: Tensor | None = None


def dense(value: Tensor | QTensor) -> Tensor:
    """A plain float32 tensor of either."""
    return value.dequantize() if isinstance(value, QTensor) else value.float()


def broadcasts(shape: torch.Size | tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether ``shape`` has as many dimensions as ``to`` and each is 1 or the same."""
    return len(shape) == len(to) and all(a in (1, b) for a, b in zip(shape, to, strict=True))


def block_view(value: ScaleLike, granularity: Granularity, shape: tuple[int, ...]) -> Tensor:
    """A scale (or zero point, offset) against ``granularity.to_blocks``: float32 [blocks, 1].

    A factored scale is [blocks, elements]. An offset that all blocks share is [1, 1]. An Inverse gives its divisor: see
    :func:`scale_blocks`.
    """
    if isinstance(value, Inverse):
        value = value.divisor
    if isinstance(value, Factored):
        return granularity.factor_blocks(value.expand(granularity, shape), shape)
    return dense(value).reshape(-1, 1)


def scale_blocks(values: Tensor, scale: ScaleLike, granularity: Granularity, shape: tuple[int, ...]) -> Tensor:
    """``scale * value``: float32 [blocks, elements]."""
    by = block_view(scale, granularity, shape)
    return values / by if isinstance(scale, Inverse) else values * by


def sub_tensors(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Those below ``name.``, with the prefix removed."""
    return {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}


def named_tensors(name: str, part: QTensor) -> dict[str, Tensor]:
    """What ``part`` stores, below ``name.``."""
    return {f"{name}.{k}": t for k, t in part.tensors().items()}


def validate_all(parts: Mapping[str, object]) -> None:
    """:meth:`QTensor.validate` of those that are QTensors; an error says which part is wrong."""
    for name, part in parts.items():
        if isinstance(part, QTensor):
            try:
                part.validate()
            except FileError as error:
                raise FileError(f"{name}: {error}") from error


def stored_tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor called ``name``; FileError where there is none."""
    if name not in tensors:
        raise FileError(f"the tensor {name!r} is missing; found {', '.join(sorted(tensors)) or 'none'}.")
    return tensors[name]


def from_spec(spec: Spec, tensors: Mapping[str, Tensor]) -> QTensor:
    """Rebuild a QTensor from its :meth:`QTensor.spec` and :meth:`QTensor.tensors`; their values are not looked at.

    Raises:
        FileError: the spec is malformed, or a tensor is missing or of the wrong shape or dtype; never anything else.
    """
    try:
        kind: type[QTensor] = REGISTRY.get(str(spec["kind"]))
        return kind.rebuild(spec, tensors)
    except NybbleError as error:
        raise FileError(str(error)) from error
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise FileError(f"malformed description of a quantized tensor ({type(error).__name__}: {error}).") from error
