"""The QTensors beside BlockQTensor: code books of vectors, columns in different quantizers, low-rank sums."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import FileError
from nybble.packing import get_layout
from nybble.qtensor import QTensor, Spec, dense, from_spec


def _sub(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}


def _named(name: str, part: QTensor) -> dict[str, Tensor]:
    return {f"{name}.{k}": t for k, t in part.tensors().items()}


@dataclass(frozen=True)
class VectorQTensor(QTensor):
    """Each run of ``d`` elements in row-major order is an entry of a code book: ``x_hat = scale * codebook[index]``.

    Attributes:
        codebook: [entries, d], float32 or 16 bits; at most 256 entries a code of 8 bits, 65,536 of 16.
        indices: uint8, packed; ``bits`` each.
        scale: float32 broadcastable to ``shape``, or a QTensor of such a shape, or None.
    """

    shape: tuple[int, ...]
    codebook: Tensor
    indices: Tensor
    bits: int
    scale: Tensor | QTensor | None = None
    kind = "vector"

    @staticmethod
    def make(shape: tuple[int, ...], codebook: Tensor, index: Tensor, scale: Tensor | QTensor | None = None) -> VectorQTensor:
        """Pack ``index`` (integers, one for each d elements of ``shape``) for ``codebook``."""
        bits = max(1, (codebook.shape[0] - 1).bit_length())
        bits = bits if bits <= 8 else 16
        flat = index.reshape(-1)
        return VectorQTensor(shape, codebook, get_layout("dense").pack(flat.to(torch.uint8 if bits <= 8 else torch.int32), bits), bits, scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:  # noqa: D102
        count = math.prod(self.shape) // self.codebook.shape[1]
        index = get_layout("dense").unpack(self.indices, self.bits, count).long()
        values = self.codebook.float()[index].view(self.shape)
        return (values if self.scale is None else values * dense(self.scale)).to(dtype)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        found = {"codebook": self.codebook, "indices": self.indices}
        if isinstance(self.scale, QTensor):
            return found | _named("scale", self.scale)
        return found if self.scale is None else found | {"scale": self.scale}

    def roles(self) -> dict[str, str]:  # noqa: D102
        return {k: {"codebook": "tables", "indices": "codes"}.get(k, "scales") for k in self.tensors()}

    def spec(self) -> Spec:  # noqa: D102
        scale = None if self.scale is None else self.scale.spec() if isinstance(self.scale, QTensor) else "plain"
        return {"kind": self.kind, "shape": list(self.shape), "bits": self.bits, "scale": scale}

    def to(self, device: torch.device | str) -> VectorQTensor:  # noqa: D102
        return self.rebuild(self.spec(), {k: t.to(device) for k, t in self.tensors().items()})

    @staticmethod
    def rebuild(spec: Spec, tensors: Mapping[str, Tensor]) -> VectorQTensor:
        """From :meth:`spec` and :meth:`tensors`."""
        shape, bits, codebook, indices = tuple(spec["shape"]), int(spec["bits"]), tensors["codebook"], tensors["indices"]
        if codebook.dim() != 2 or math.prod(shape) % codebook.shape[1]:
            raise FileError(f"a code book of shape {list(codebook.shape)} does not tile a tensor of shape {list(shape)}.")
        count = math.prod(shape) // codebook.shape[1]
        if indices.dtype != torch.uint8 or indices.numel() != get_layout("dense").size(count, bits):
            raise FileError(f"{count} indices of {bits} bits expected; found {indices.numel()} bytes.")
        if count and int(get_layout("dense").unpack(indices, bits, count).max()) >= codebook.shape[0]:
            raise FileError(f"an index points past the {codebook.shape[0]} entries of the code book.")
        scale: Any = spec["scale"]
        value = None if scale is None else tensors["scale"] if scale == "plain" else from_spec(scale, _sub(tensors, "scale"))
        return VectorQTensor(shape, codebook, indices, bits, value)


@dataclass(frozen=True)
class SplitQTensor(QTensor):
    """Slices along one dimension in different quantizers; a plain tensor as a part stays in its own dtype (outlier columns).

    Attributes:
        dim: the dimension that is split.
        index: int32, a permutation of ``range(shape[dim])``: where each slice of the concatenated parts belongs.
        parts: in the order of ``index``.
    """

    shape: tuple[int, ...]
    dim: int
    index: Tensor
    parts: tuple[QTensor | Tensor, ...]
    kind = "split"

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:  # noqa: D102
        joined = torch.cat([dense(part) for part in self.parts], self.dim)
        out = torch.empty_like(joined)
        out.index_copy_(self.dim, self.index.long(), joined)
        return out.to(dtype)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        found = {"index": self.index}
        for i, part in enumerate(self.parts):
            found |= _named(f"part.{i}", part) if isinstance(part, QTensor) else {f"part.{i}": part}
        return found

    def roles(self) -> dict[str, str]:  # noqa: D102
        found = {"index": "tables"}
        for i, part in enumerate(self.parts):
            if isinstance(part, QTensor):
                found |= {f"part.{i}.{k}": role for k, role in part.roles().items()}
            else:
                found[f"part.{i}"] = "unquantized"
        return found

    def spec(self) -> Spec:  # noqa: D102
        parts = [part.spec() if isinstance(part, QTensor) else {"kind": "plain"} for part in self.parts]
        return {"kind": self.kind, "shape": list(self.shape), "dim": self.dim, "parts": parts}

    def to(self, device: torch.device | str) -> SplitQTensor:  # noqa: D102
        return self.rebuild(self.spec(), {k: t.to(device) for k, t in self.tensors().items()})

    @staticmethod
    def rebuild(spec: Spec, tensors: Mapping[str, Tensor]) -> SplitQTensor:
        """From :meth:`spec` and :meth:`tensors`."""
        parts: list[QTensor | Tensor] = []
        for i, part in enumerate(spec["parts"]):
            name = f"part.{i}"
            parts.append(tensors[name] if part["kind"] == "plain" else from_spec(part, _sub(tensors, name)))
        shape, dim, index = tuple(spec["shape"]), int(spec["dim"]), tensors["index"]
        if sum(part.shape[dim] for part in parts) != shape[dim] or sorted(index.tolist()) != list(range(shape[dim])):
            raise FileError(f"the parts of a split tensor do not make up its {shape[dim]} slices.")
        return SplitQTensor(shape, dim, index, tuple(parts))


@dataclass(frozen=True)
class LowRankSum(QTensor):
    """``x_hat = base + a @ b``: low-rank compensation of what quantization lost (LoRC).

    Attributes:
        base: QTensor [..., out, in]. a: [..., out, r], b: [..., r, in]; plain or quantized.
    """

    base: QTensor
    a: Tensor | QTensor
    b: Tensor | QTensor
    kind = "low-rank-sum"

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of the sum."""
        return self.base.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:  # noqa: D102
        return (self.base.dequantize() + dense(self.a) @ dense(self.b)).to(dtype)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        found = _named("base", self.base)
        for name, part in (("a", self.a), ("b", self.b)):
            found |= _named(name, part) if isinstance(part, QTensor) else {name: part}
        return found

    def roles(self) -> dict[str, str]:  # noqa: D102
        found = {f"base.{k}": role for k, role in self.base.roles().items()}
        for name, part in (("a", self.a), ("b", self.b)):
            found |= {f"{name}.{k}": r for k, r in part.roles().items()} if isinstance(part, QTensor) else {name: "unquantized"}
        return found

    def spec(self) -> Spec:  # noqa: D102
        sides = {n: p.spec() if isinstance(p, QTensor) else {"kind": "plain"} for n, p in (("a", self.a), ("b", self.b))}
        return {"kind": self.kind, "base": self.base.spec(), **sides}

    def to(self, device: torch.device | str) -> LowRankSum:  # noqa: D102
        return self.rebuild(self.spec(), {k: t.to(device) for k, t in self.tensors().items()})

    @staticmethod
    def rebuild(spec: Spec, tensors: Mapping[str, Tensor]) -> LowRankSum:
        """From :meth:`spec` and :meth:`tensors`."""
        base = from_spec(spec["base"], _sub(tensors, "base"))
        a, b = (tensors[n] if spec[n]["kind"] == "plain" else from_spec(spec[n], _sub(tensors, n)) for n in ("a", "b"))
        if a.shape[-1] != b.shape[-2] or a.shape[-2] != base.shape[-2] or b.shape[-1] != base.shape[-1]:
            raise FileError(f"low-rank factors {list(a.shape)} and {list(b.shape)} do not fit a tensor {list(base.shape)}.")
        return LowRankSum(base, a, b)


KINDS: dict[str, Any] = {cls.kind: cls for cls in (VectorQTensor, SplitQTensor, LowRankSum)}
