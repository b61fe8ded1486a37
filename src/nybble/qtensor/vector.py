"""Code books of vectors: each run of d elements is one index."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.core.errors import FileError, GranularityError, SchemeError
from nybble.packing import get_layout
from nybble.qtensor import (
    QTensor,
    Spec,
    broadcasts,
    dense,
    from_spec,
    named_tensors,
    stored_tensor,
    sub_tensors,
    validate_all,
)

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
CHUNK = 1 << 21
"""Distances that are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class VectorQuantizer:
    """What a code book of vectors is, without its entries: the counterpart of a Quantizer for scalars.

    Attributes:
        k: entries of the code book, 2 to 65,536. d: neighbouring elements that share an index.
        channel: whether each row has a float16 scale beside the code book.

    Raises:
        SchemeError: k or d out of range.

    >>> VectorQuantizer.parse("vector k=256 d=2")
    VectorQuantizer(k=256, d=2, channel=False)
    """

    k: int
    d: int
    channel: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.k <= 1 << 16:
            raise SchemeError(f"a code book has 2 to 65536 entries; got k={self.k}.")
        if self.d < 1:
            raise SchemeError(f"an index stands for one element or more; got d={self.d}.")

    def __str__(self) -> str:
        return f"vector k={self.k} d={self.d}{' channel' if self.channel else ''}"

    @staticmethod
    def parse(line: str) -> VectorQuantizer:
        """Inverse of ``str``.

        Raises:
            SchemeError: another line.
        """
        found = re.fullmatch(r"\s*vector\s+k=(\d{1,6})\s+d=(\d{1,6})(\s+channel)?\s*", line)
        if found is None:
            raise SchemeError(f"{line!r} is no code book of vectors; write 'vector k=256 d=2', or add 'channel'.")
        return VectorQuantizer(k=int(found[1]), d=int(found[2]), channel=found[3] is not None)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise GranularityError unless d divides the last dimension: no run crosses a row."""
        if shape[-1] % self.d:
            fits = [n for n in range(2, 17) if shape[-1] % n == 0]
            raise GranularityError(
                f"{shape[-1]} columns can't be cut into runs of {self.d}; "
                f"widths that fit: {', '.join(map(str, fits)) or '1'}."
            )

    def quantize(
        self, x: Tensor, codebook: Tensor, scale: Tensor | None = None, weight: Tensor | None = None
    ) -> VectorQTensor:
        """Each run becomes its nearest entry, the first of equal ones.

        Args:
            x: float32, rows of a length that d divides.
            codebook: [k or fewer, d], float32 or 16 bits, as it will be stored.
            scale: broadcastable to ``x``; x is divided by it first (but by no 0, under which it becomes 0).
            weight: importance of the elements in the squared distance (>= 0), broadcastable to ``x``.
        """
        self.check(tuple(x.shape))
        runs = (x if scale is None else x / divisor(scale)).reshape(-1, self.d)
        importance = None if weight is None else weight.expand(x.shape).reshape(-1, self.d)
        return VectorQTensor.make(tuple(x.shape), codebook, nearest(runs, codebook.float(), importance), scale)


def divisor(scale: Tensor) -> Tensor:
    """The scale in float32, with 1 for 0."""
    wide = scale.float()
    return torch.where(wide == 0, torch.ones_like(wide), wide)


def nearest(runs: Tensor, codebook: Tensor, weight: Tensor | None = None) -> Tensor:
    """Index of the entry with the least ``sum_d weight (run - entry)^2``, the first of equal ones.

    Args:
        runs: float32 [n, d], finite.
        codebook: float32 [k, d].
        weight: float32 [n, d], or None for 1.

    Returns:
        int64 [n].
    """
    entries = len(codebook)
    found = [torch.empty(0, dtype=torch.long, device=runs.device)]
    # Entries in rows, and the first least one by two maxima: on a CPU a third of the time of products and argmin.
    places = torch.arange(entries, 0, -1, dtype=torch.float32, device=runs.device)[:, None]
    for x, w in zip(torch.split(runs, rows_at_once(entries)), _split(weight, entries), strict=False):
        if w is None:
            distance = torch.addmm(codebook.square().sum(1, keepdim=True), codebook, x.T, alpha=-2)
        else:
            distance = torch.cat([codebook.square(), -2 * codebook], 1) @ torch.cat([w, w * x], 1).T
        least = distance.eq_(distance.amin(0)).mul_(places).amax(0)
        found.append((entries - least).long().clamp_(max=entries - 1))
    return torch.cat(found)


def _split(weight: Tensor | None, entries: int) -> Iterable[Tensor | None]:
    return itertools.repeat(None) if weight is None else torch.split(weight, rows_at_once(entries))


def rows_at_once(entries: int) -> int:
    """How many runs are compared with all entries at a time; their distances fill a cache rather than the memory."""
    return max(1, CHUNK // entries)


@dataclass(frozen=True)
class VectorQTensor(QTensor):
    """Each run of ``d`` elements in row-major order is an entry of a code book: ``x_hat = scale * codebook[index]``.

    Attributes:
        codebook: [entries, d], float32 or 16 bits; at most 256 entries a code of 8 bits, 65,536 of 16.
        indices: uint8, packed; ``bits`` each.
        scale: float32 or 16 bits, broadcastable to ``shape``, or a QTensor of such a shape, or None.
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

    def index(self) -> Tensor:
        """int64 [runs]: which entry each run is."""
        count = math.prod(self.shape) // self.codebook.shape[1]
        return get_layout("dense").unpack(self.indices, self.bits, count).long()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:  # noqa: D102
        values = self.codebook.float()[self.index()].view(self.shape)
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

    def validate(self) -> None:
        """Every index names an entry."""
        found = self.index()
        if found.numel() and int(found.max()) >= self.codebook.shape[0]:
            raise FileError(
                f"an index points to entry {int(found.max())} of a code book of {self.codebook.shape[0]}; "
                "the file is damaged."
            )
        validate_all({"scale": self.scale})

    @staticmethod
    def rebuild(spec: Spec, tensors: Mapping[str, Tensor]) -> VectorQTensor:
        """From :meth:`spec` and :meth:`tensors`."""
        shape, bits = tuple(int(n) for n in spec["shape"]), int(spec["bits"])
        codebook, indices = stored_tensor(tensors, "codebook"), stored_tensor(tensors, "indices")
        if codebook.dim() != 2 or codebook.dtype not in _FLOATS or math.prod(shape) % codebook.shape[1]:
            raise FileError(
                f"a code book of {codebook.dtype} {list(codebook.shape)} does not tile a tensor of shape {list(shape)}."
            )
        if bits not in (*range(1, 9), 16):
            raise FileError(f"indices have 1 to 8 bits, or 16; got {bits}.")
        count = math.prod(shape) // codebook.shape[1]
        if indices.dtype != torch.uint8 or indices.shape != (get_layout("dense").size(count, bits),):
            raise FileError(f"{count} indices of {bits} bits expected; found {list(indices.shape)} {indices.dtype}.")
        given = spec["scale"]
        scale: Tensor | QTensor | None = None
        if given == "plain":
            scale = plain = stored_tensor(tensors, "scale")
            if plain.dtype not in _FLOATS:
                raise FileError(f"a scale is of float32 or 16 bits; found {plain.dtype}.")
        elif given is not None:
            scale = from_spec(given, sub_tensors(tensors, "scale"))
        if scale is not None and not broadcasts(tuple(scale.shape), shape):
            raise FileError(f"a scale of shape {list(scale.shape)} does not fit a tensor of shape {list(shape)}.")
        return VectorQTensor(shape, codebook, indices, bits, scale)


PART = VectorQTensor
