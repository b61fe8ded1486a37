"""Integers of 1 to 15 bits, a width for each group of elements, under one range for the whole tensor (DiffQ).

    x_hat = low + code * (high - low) / (2^b - 1)

Défossez et al. 2021, "Differentiable Model Compression via Pseudo Quantization Noise", arXiv:2104.09987.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.core.errors import FileError, SchemeError
from nybble.core.shapes import Float, Integer
from nybble.packing import get_layout
from nybble.qtensor import QTensor, Spec, stored_tensor

MOST = 15
"""Bits of the widest code."""
_DENSE = get_layout("dense")


@dataclass(frozen=True)
class MixedBits(QTensor):
    """See the module.

    Attributes:
        least: bits that a width of 0 stands for.
        counts: how many groups have 1, 2 ... :data:`MOST` bits.
        ends: float32 [2], lowest and highest value.
        widths: uint8, the bits of every group less ``least``, densely packed; empty where all have ``least``.
        codes: uint8; of each width, from the narrowest, the codes of its groups in their order: of more than 8 bits the
            low bytes, and then the rest. Each run begins at a byte.
    """

    shape: tuple[int, ...]
    least: int
    counts: tuple[int, ...]
    ends: Tensor
    widths: Tensor
    codes: Tensor
    kind = "mixed-bits"

    @staticmethod
    def make(x: Float[Tensor, "*shape"], bits: Integer[Tensor, " groups"], least: int = 1) -> MixedBits:
        """Round to nearest, ties to even, under the range of ``x``.

        Args:
            x: any shape; groups are of its elements in their order.
            bits: of each group, ``least`` to :data:`MOST`; a number of groups that divides the elements.
            least: bits that the file counts from.

        Raises:
            SchemeError: sizes or bits are of another kind, or ``x`` isn't finite.
        """
        groups = bits.numel()
        if not x.numel() or not groups or x.numel() % groups:
            raise SchemeError(f"{x.numel()} elements can't be parted into {groups} groups of one size.")
        lowest, highest = int(bits.min()), int(bits.max())
        if not 1 <= least <= lowest <= highest <= MOST:
            raise SchemeError(f"widths of {lowest} to {highest} bits; they are {least} to {MOST}.")
        ends = torch.stack(torch.aminmax(x.detach().float()))
        if not bool(ends.isfinite().all()):
            raise SchemeError("numbers that aren't finite have no range to be rounded in.")
        scale = steps(ends, bits)
        cut = (x.detach().float().reshape(groups, -1) - ends[0]) / torch.where(scale == 0, 1.0, scale)
        top = (2 ** bits.long() - 1).view(-1, 1)
        codes = cut.round_().int().clamp_(min=0).minimum(top.int())
        counts = tuple(torch.bincount(bits.long(), minlength=MOST + 1)[1:].tolist())
        runs = [run for b, count in enumerate(counts, 1) if count for run in _packed(codes[bits == b], b)]
        width, widths = _width(least, counts), (bits - least).to(torch.uint8)
        packed = _DENSE.pack(widths, width) if width else widths[:0]
        return MixedBits(tuple(x.shape), least, counts, ends, packed, torch.cat(runs))

    @property
    def groups(self) -> int:
        """How many there are."""
        return sum(self.counts)

    def bits(self) -> Integer[Tensor, " groups"]:
        """int64, of every group."""
        width = _width(self.least, self.counts)
        if not width:
            return torch.full((self.groups,), self.least, device=self.ends.device)
        return _DENSE.unpack(self.widths, width, self.groups).long() + self.least

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:  # noqa: D102
        size, at = math.prod(self.shape) // self.groups, 0
        rows = []
        for b, count in enumerate(self.counts, 1):
            if count:
                end = at + _bytes(count * size, b)
                rows.append(_unpacked(self.codes[at:end], b, count * size).view(count, size))
                at = end
        joined, bits = torch.cat(rows), self.bits()
        codes = torch.empty_like(joined).index_copy_(0, bits.argsort(stable=True), joined)
        return (codes.float() * steps(self.ends, bits) + self.ends[0]).view(self.shape).to(dtype)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {"codes": self.codes, "widths": self.widths, "ends": self.ends}

    def roles(self) -> dict[str, str]:  # noqa: D102
        return {"codes": "codes", "widths": "tables", "ends": "scales"}

    def spec(self) -> Spec:  # noqa: D102
        return {"kind": self.kind, "shape": list(self.shape), "least": self.least, "counts": list(self.counts)}

    def to(self, device: torch.device | str) -> MixedBits:  # noqa: D102
        return self.rebuild(self.spec(), {name: t.to(device) for name, t in self.tensors().items()})

    def validate(self) -> None:  # noqa: D102
        found = torch.bincount(self.bits(), minlength=MOST + 1)[1:].tolist()
        if found != list(self.counts):
            raise FileError(f"groups by width are {found}, and the description says {list(self.counts)}.")
        if not bool(self.ends.isfinite().all()):
            raise FileError(f"the range is {self.ends.tolist()}.")

    @staticmethod
    def rebuild(spec: Spec, tensors: Mapping[str, Tensor]) -> MixedBits:
        """From :meth:`spec` and :meth:`tensors`."""
        shape, counts, least = (
            tuple(int(n) for n in spec["shape"]),
            tuple(int(n) for n in spec["counts"]),
            spec["least"],
        )
        numel, groups = math.prod(shape), sum(counts)
        if len(counts) != MOST or min(counts) < 0 or groups < 1 or numel % groups or not 1 <= least <= MOST:
            raise FileError(
                f"{list(counts)} groups of 1 to {MOST} bits, counted from {least}, can't part {list(shape)}."
            )
        if any(counts[: least - 1]):
            raise FileError(f"{list(counts)} groups of 1 to {MOST} bits; the least is said to be {least}.")
        width, size = _width(least, counts), numel // groups
        want = {
            "codes": (torch.uint8, sum(_bytes(count * size, b) for b, count in enumerate(counts, 1))),
            "widths": (torch.uint8, _DENSE.size(groups, width) if width else 0),
            "ends": (torch.float32, 2),
        }
        found = {name: stored_tensor(tensors, name) for name in want}
        for name, (dtype, length) in want.items():
            t = found[name]
            if t.dtype != dtype or tuple(t.shape) != (length,):
                raise FileError(f"{name}: {t.dtype} {list(t.shape)}, where {dtype} [{length}] belongs.")
        return MixedBits(shape, least, counts, found["ends"], found["widths"], found["codes"])


def steps(ends: Float[Tensor, " 2"], bits: Tensor) -> Float[Tensor, "groups 1"]:
    """What one step of each group's codes is; ``bits`` may be fractions."""
    return (ends[1] - ends[0]) / (2 ** bits.view(-1, 1).float() - 1)


def _width(least: int, counts: tuple[int, ...]) -> int:
    """Bits that say a group's width: as many as the widest there is needs."""
    widest = max(b for b, count in enumerate(counts, 1) if count)
    return (widest - least).bit_length()


def _bytes(count: int, bits: int) -> int:
    """Of ``count`` codes."""
    return _DENSE.size(count, min(bits, 8)) + (_DENSE.size(count, bits - 8) if bits > 8 else 0)


def _packed(codes: Tensor, bits: int) -> list[Tensor]:
    """int32 codes -> uint8 runs."""
    flat = codes.reshape(-1)
    low = _DENSE.pack((flat & 255).to(torch.uint8), min(bits, 8))
    return [low] if bits <= 8 else [low, _DENSE.pack((flat >> 8).to(torch.uint8), bits - 8)]


def _unpacked(data: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`_packed`: int32 [count]."""
    if bits <= 8:
        return _DENSE.unpack(data, bits, count).int()
    low = _DENSE.unpack(data[:count], 8, count).int()
    return low | _DENSE.unpack(data[count:], bits - 8, count).int() << 8


PART = MixedBits
