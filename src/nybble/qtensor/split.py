"""Columns or rows of one tensor in different quantizers (outlier columns, PTQ1.61)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.core.errors import FileError
from nybble.core.shapes import Integer
from nybble.packing import get_layout
from nybble.qtensor import QTensor, Spec, dense, from_spec, named_tensors, stored_tensor, sub_tensors, validate_all


@dataclass(frozen=True)
class SplitQTensor(QTensor):
    """Slices along one dimension in different quantizers; outlier columns, say.

    A plain tensor as a part stays in its own dtype.

    Attributes:
        dim: the dimension that is split.
        index: where each slice of the concatenated parts belongs: int32, a permutation of ``range(shape[dim])``. Or,
            where every part has its slices in the order of the tensor, the number of each slice's part: uint8, densely
            packed, 1 bit a slice of two parts (:func:`pack_members`).
        parts: in the order of ``index``.
    """

    shape: tuple[int, ...]
    dim: int
    index: Tensor
    parts: tuple[QTensor | Tensor, ...]
    kind = "split"

    def order(self) -> Tensor:
        """int64 [shape[dim]]: where each slice of the concatenated parts belongs."""
        if self.index.dtype == torch.int32:
            return self.index.long()
        return self._members().argsort(stable=True)

    def slices(self) -> list[Tensor]:
        """int64, for every part: which slices of the tensor it has, in its own order."""
        return list(torch.split(self.order(), [part.shape[self.dim] for part in self.parts]))

    def _members(self) -> Tensor:
        """uint8 [shape[dim]]: the number of each slice's part."""
        found: Tensor = get_layout("dense").unpack(self.index, _bits(len(self.parts)), self.shape[self.dim])
        return found

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:  # noqa: D102
        joined = torch.cat([dense(part) for part in self.parts], self.dim)
        out = torch.empty_like(joined)
        out.index_copy_(self.dim, self.order(), joined)
        return out.to(dtype)

    @property
    def _index_name(self) -> str:
        return "index" if self.index.dtype == torch.int32 else "members"

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        found = {self._index_name: self.index}
        for i, part in enumerate(self.parts):
            found |= named_tensors(f"part.{i}", part) if isinstance(part, QTensor) else {f"part.{i}": part}
        return found

    def roles(self) -> dict[str, str]:  # noqa: D102
        found = {self._index_name: "tables"}
        for i, part in enumerate(self.parts):
            if isinstance(part, QTensor):
                found |= {f"part.{i}.{k}": role for k, role in part.roles().items()}
            else:
                found[f"part.{i}"] = "unquantized"
        return found

    def spec(self) -> Spec:  # noqa: D102
        parts = [part.spec() if isinstance(part, QTensor) else {"kind": "plain"} for part in self.parts]
        found = {"kind": self.kind, "shape": list(self.shape), "dim": self.dim, "parts": parts}
        return found if self._index_name == "index" else {**found, "index": self._index_name}

    def to(self, device: torch.device | str) -> SplitQTensor:  # noqa: D102
        return self.rebuild(self.spec(), {k: t.to(device) for k, t in self.tensors().items()})

    def validate(self) -> None:
        """Every slice of the tensor is written once: a permutation, or as many members of each part as it has."""
        if self.index.dtype == torch.int32:
            device = self.index.device
            if not torch.equal(self.index.long().sort().values, torch.arange(len(self.index), device=device)):
                raise FileError(
                    f"the index of a split tensor is no permutation of its {len(self.index)} slices; the file is "
                    "damaged."
                )
        else:
            found = self._members().long().bincount(minlength=len(self.parts)).tolist()
            sizes = [part.shape[self.dim] for part in self.parts]
            if found != sizes:
                raise FileError(
                    f"the parts of a split tensor have {sizes} slices, and its index gives them {found}; the file is "
                    "damaged."
                )
        validate_all({f"part.{i}": part for i, part in enumerate(self.parts)})

    @staticmethod
    def rebuild(spec: Spec, tensors: Mapping[str, Tensor]) -> SplitQTensor:
        """From :meth:`spec` and :meth:`tensors`."""
        parts: list[QTensor | Tensor] = []
        for i, part in enumerate(spec["parts"]):
            name = f"part.{i}"
            plain = part["kind"] == "plain"
            parts.append(stored_tensor(tensors, name) if plain else from_spec(part, sub_tensors(tensors, name)))
        shape, dim = tuple(int(n) for n in spec["shape"]), int(spec["dim"])
        if sum(part.shape[dim] for part in parts) != shape[dim]:
            raise FileError(f"the parts of a split tensor do not make up its {shape[dim]} slices.")
        name = str(spec.get("index", "index"))
        index = stored_tensor(tensors, name)
        wanted: tuple[torch.dtype, tuple[int, ...]] = (torch.int32, (shape[dim],))
        if name == "members":
            wanted = torch.uint8, (get_layout("dense").size(shape[dim], _bits(len(parts))),)
        if (index.dtype, tuple(index.shape)) != wanted:
            raise FileError(
                f"{name} of {shape[dim]} slices is {wanted[0]} {list(wanted[1])}; found {index.dtype} "
                f"{list(index.shape)}."
            )
        if not all(part.is_floating_point() for part in parts if isinstance(part, Tensor)):
            raise FileError("a plain part of a split tensor holds floating-point numbers.")
        at = dim % len(shape)
        if any((*part.shape[:at], shape[at], *part.shape[at + 1 :]) != shape for part in parts):
            raise FileError(f"the parts of a split tensor are not slices of its shape {list(shape)}.")
        return SplitQTensor(shape, dim, index, tuple(parts))


def pack_members(members: Integer[Tensor, " slices"], parts: int) -> Tensor:
    """The index of a split tensor whose parts have their slices in order.

    Args:
        members: the number of each slice's part, 0 .. parts - 1.
        parts: how many there are.

    Returns:
        uint8, densely packed: 1 bit a slice of two parts, 2 of three or four.
    """
    packed: Tensor = get_layout("dense").pack(members.to(torch.uint8), _bits(parts))
    return packed


def _bits(parts: int) -> int:
    return max(1, (parts - 1).bit_length())


PART = SplitQTensor
