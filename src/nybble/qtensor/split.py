"""Columns or rows of one tensor in different quantizers (outlier columns, PTQ1.61, DiffQ's groups)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.core.errors import FileError
from nybble.qtensor import QTensor, Spec, dense, from_spec, named_tensors, stored_tensor, sub_tensors, validate_all


@dataclass(frozen=True)
class SplitQTensor(QTensor):
    """Slices along one dimension in different quantizers; outlier columns, say.

    A plain tensor as a part stays in its own dtype.

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
            found |= named_tensors(f"part.{i}", part) if isinstance(part, QTensor) else {f"part.{i}": part}
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

    def validate(self) -> None:
        """The index is a permutation, so that every slice of the tensor is written once."""
        if not torch.equal(self.index.long().sort().values, torch.arange(len(self.index), device=self.index.device)):
            raise FileError(
                f"the index of a split tensor is no permutation of its {len(self.index)} slices; the file is damaged."
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
        shape, dim, index = tuple(int(n) for n in spec["shape"]), int(spec["dim"]), stored_tensor(tensors, "index")
        if sum(part.shape[dim] for part in parts) != shape[dim]:
            raise FileError(f"the parts of a split tensor do not make up its {shape[dim]} slices.")
        if index.dtype != torch.int32 or index.shape != (shape[dim],):
            raise FileError(f"an int32 index of {shape[dim]} slices expected; found {list(index.shape)} {index.dtype}.")
        if not all(part.is_floating_point() for part in parts if isinstance(part, Tensor)):
            raise FileError("a plain part of a split tensor holds floating-point numbers.")
        at = dim % len(shape)
        if any((*part.shape[:at], shape[at], *part.shape[at + 1 :]) != shape for part in parts):
            raise FileError(f"the parts of a split tensor are not slices of its shape {list(shape)}.")
        return SplitQTensor(shape, dim, index, tuple(parts))


PART = SplitQTensor
