"""Code books of vectors: each run of d elements is one index."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import FileError
from nybble.packing import get_layout
from nybble.qtensor import QTensor, Spec, broadcasts, dense, from_spec, named_tensors, sub_tensors


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
    def make(
        shape: tuple[int, ...], codebook: Tensor, index: Tensor, scale: Tensor | QTensor | None = None
    ) -> VectorQTensor:
        """Pack ``index`` (integers, one for each d elements of ``shape``) for ``codebook``."""
        bits = max(1, (codebook.shape[0] - 1).bit_length())
        bits = bits if bits <= 8 else 16
        flat = index.reshape(-1)
        return VectorQTensor(
            shape,
            codebook,
            get_layout("dense").pack(flat.to(torch.uint8 if bits <= 8 else torch.int32), bits),
            bits,
            scale,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:  # noqa: D102
        count = math.prod(self.shape) // self.codebook.shape[1]
        index = get_layout("dense").unpack(self.indices, self.bits, count).long()
        values = self.codebook.float()[index].view(self.shape)
        return (values if self.scale is None else values * dense(self.scale)).to(dtype)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        found = {"codebook": self.codebook, "indices": self.indices}
        if isinstance(self.scale, QTensor):
            return found | named_tensors("scale", self.scale)
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
        shape, bits, codebook, indices = (
            tuple(spec["shape"]),
            int(spec["bits"]),
            tensors["codebook"],
            tensors["indices"],
        )
        if codebook.dim() != 2 or math.prod(shape) % codebook.shape[1]:
            raise FileError(
                f"a code book of shape {list(codebook.shape)} does not tile a tensor of shape {list(shape)}."
            )
        count = math.prod(shape) // codebook.shape[1]
        if indices.dtype != torch.uint8 or indices.numel() != get_layout("dense").size(count, bits):
            raise FileError(f"{count} indices of {bits} bits expected; found {indices.numel()} bytes.")
        if count and int(get_layout("dense").unpack(indices, bits, count).max()) >= codebook.shape[0]:
            raise FileError(f"an index points past the {codebook.shape[0]} entries of the code book.")
        scale: Any = spec["scale"]
        value = (
            None
            if scale is None
            else tensors["scale"]
            if scale == "plain"
            else from_spec(scale, sub_tensors(tensors, "scale"))
        )
        if value is not None and not broadcasts(tuple(value.shape), shape):
            raise FileError(f"a scale of shape {list(value.shape)} does not fit a tensor of shape {list(shape)}.")
        return VectorQTensor(shape, codebook, indices, bits, value)


PART = VectorQTensor
