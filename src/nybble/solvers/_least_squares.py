"""Scales and offsets of a weight in closed form, its grid values given.

W_hat = S V + O, V the grid values, one scale and one offset a block: ``tr((W - W_hat) H (W - W_hat)^T)`` is quadratic
in all scales and offsets at once. Blocks that share rows are coupled through H, so they are solved together (decoupleQ,
arXiv:2404.12759, eq. 8): for a row with n blocks, A the n x columns matrix with V of each block in its own columns and
I the same with ones,

    [ A H A^T   A H I^T ] [ds]   [ A H l ]
    [ I H A^T   I H I^T ] [do] = [ I H l ]      l = W - W_hat, ds and do what is added to the scales and offsets

A block of several rows (``tensor``, ``block=RxC``) sums over them. In float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_ELEMENTS = 1 << 24  # of the systems that are solved at a time
_RIDGE = 1e-10  # on systems with ones on the diagonal: what is singular (a block of equal values) gets no long step


@dataclass(frozen=True)
class Bands:
    """Blocks that are solved together: rows that share blocks, and cut their columns alike.

    Attributes:
        part: which of its row's blocks each column is in, int64 [columns]. parts: how many a row has.
        band: of each row, ascending, int64 [rows]; block ``band * parts + part`` is an element's.
    """

    part: Tensor
    parts: int
    band: Tensor

    @staticmethod
    def of(owner: Tensor) -> Bands | None:
        """From the block of every element, int64 [rows, columns]; None where rows cut their columns differently."""
        part = owner[0] - owner[0, 0]
        parts = int(part.max()) + 1
        first = owner[:, 0]
        if bool((owner - first[:, None] != part).any()) or bool((first % parts != 0).any()):
            return None
        return Bands(part, parts, first // parts)

    def of_blocks(self, rows: Tensor) -> Tensor:
        """Sums over a band's rows, for each of its blocks: [blocks]."""
        count = int(self.band[-1]) + 1
        return rows.new_zeros(count).index_add_(0, self.band, rows).repeat_interleave(self.parts)

    def chunks(self, unknowns: int) -> Iterator[slice]:
        """Rows in pieces whose systems fit a moderate memory; none cuts a band."""
        starts = torch.cat([self.band.new_ones(1, dtype=torch.bool), self.band[1:] != self.band[:-1]]).nonzero()[:, 0]
        ends = [*starts[1:].tolist(), len(self.band)]
        begin = 0
        for start, end in zip(starts.tolist(), ends, strict=True):
            if (end - begin) * unknowns**2 > _ELEMENTS and start > begin:
                yield slice(begin, start)
                begin = start
        yield slice(begin, len(self.band))


@dataclass(frozen=True)
class Parts:
    """Blocks of which no two have a row in common, so that all can move at once.

    Attributes:
        columns: that they have elements in, int64. inside: which elements of these are theirs, [rows, columns].
        block: the block of each row, int64 [rows], -1 for none.
    """

    columns: Tensor
    inside: Tensor
    block: Tensor

    @staticmethod
    def of(owner: Tensor) -> Iterator[Parts]:
        """All blocks, in parts: blocks are numbered in row-major order, so every width-th of them is apart."""
        width = int((owner.amax(1) - owner.amin(1)).max()) + 1
        for number in range(width):
            there = owner % width == number
            columns = there.any(0).nonzero()[:, 0]
            yield Parts(columns, there[:, columns], torch.where(there, owner, -1).amax(1))

    def by_block(self, elements: Tensor, count: int) -> Tensor:
        """Sums over each block's elements [rows, columns], float64 [count]."""
        total = torch.zeros(count, dtype=torch.float64, device=elements.device)
        real = self.block >= 0
        return total.index_add_(0, self.block[real], elements.sum(1)[real].double())

    def spread(self, blocks: Tensor) -> Tensor:
        """A value of every block for its rows, float32 [rows, 1]; 0 where a row has no block."""
        return torch.where(self.block >= 0, blocks[self.block.clamp_min(0)], 0).float()[:, None]


def steps(values: Tensor, lost: Tensor, second: Tensor, bands: Bands, scale: Tensor, offsets: bool) -> Tensor:
    """What to add to all scales (and offsets), so that the error is the least that these grid values can have.

    Scales stay positive: one that the solution has at zero or below stays where it is, and the others are solved anew.

    Args:
        values: V, float32 [rows, columns].
        lost: W - W_hat, the same.
        second: H, float32 [groups, columns, columns], of as many rows each.
        bands: who is solved with whom.
        scale: as they are, float32 [blocks].
        offsets: whether there are offsets.

    Returns:
        float64 [1 or 2, blocks].
    """
    wide, unknowns = second.double(), bands.parts * (2 if offsets else 1)
    found = torch.zeros(unknowns // bands.parts, len(scale), dtype=torch.float64, device=scale.device)
    pieces = [slice(0, len(values))] if len(second) > 1 else bands.chunks(unknowns)
    for rows in pieces:
        matrix, right = _systems(values[rows], lost[rows], wide, bands, offsets)
        band = bands.band[rows] - bands.band[rows][0]
        count = int(band[-1]) + 1
        if count != len(matrix):
            matrix = matrix.new_zeros(count, unknowns, unknowns).index_add_(0, band, matrix)
            right = right.new_zeros(count, unknowns).index_add_(0, band, right)
        start = int(bands.band[rows][0]) * bands.parts
        blocks = slice(start, start + count * bands.parts)
        step = _positive(matrix, right, scale[blocks].double().view(count, bands.parts))
        found[:, blocks] = step.view(count, -1, bands.parts).transpose(0, 1).reshape(len(found), -1)
    return found


def _systems(values: Tensor, lost: Tensor, second: Tensor, bands: Bands, offsets: bool) -> tuple[Tensor, Tensor]:
    """Matrices [rows, unknowns, unknowns] and right sides [rows, unknowns] of every row; float64."""
    groups, columns, _ = second.shape
    values, lost = (x.double().view(groups, -1, columns) for x in (values, lost))
    inside = torch.nn.functional.one_hot(bands.part, bands.parts).double()  # [columns, parts]
    n, unknowns = bands.parts, bands.parts * (2 if offsets else 1)
    matrix = values.new_zeros(*values.shape[:2], unknowns, unknowns)
    for p in range(n):
        own = bands.part == p
        product = values[..., own] @ second[:, own]
        matrix[..., p, :n] = (product * values) @ inside
        if offsets:
            matrix[..., p, n:] = product @ inside
    pull = lost @ second
    right = (pull * values) @ inside
    if offsets:
        matrix[..., n:, :n] = matrix[..., :n, n:].mT
        matrix[..., n:, n:] = (inside.T @ second @ inside)[:, None]
        right = torch.cat([right, pull @ inside], -1)
    return matrix.flatten(0, 1), right.flatten(0, 1)


def _positive(matrix: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """Solutions [bands, unknowns] under which every scale [bands, parts] stays above zero."""
    free, parts = torch.ones_like(right), scale.shape[1]
    while True:
        step = _solved(matrix * free[:, :, None] * free[:, None], right * free)
        low = scale + step[:, :parts] <= 0
        low &= free[:, :parts] > 0
        if not bool(low.any()):
            return step
        free[:, :parts] = torch.where(low, 0.0, free[:, :parts])


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """Solutions [systems, unknowns] of positive semidefinite systems; what a system says nothing about is 0."""
    power = matrix.diagonal(dim1=-2, dim2=-1)
    root = torch.where(power > 0, power, 1.0).rsqrt()
    unit = matrix * root[:, :, None] * root[:, None]
    unit.diagonal(dim1=-2, dim2=-1).copy_(torch.ones_like(power))
    ridge = torch.full_like(power[:, :1], _RIDGE)
    identity = torch.eye(power.shape[1], dtype=unit.dtype, device=unit.device)
    for _ in range(4):
        lower, info = torch.linalg.cholesky_ex(unit + ridge[..., None] * identity)
        if not bool((info != 0).any()):
            break
        ridge = torch.where(info[:, None] != 0, ridge * 1000, ridge)
    found = torch.cholesky_solve((right * root)[..., None], lower)[..., 0] * root
    return torch.where(torch.isfinite(found).all(-1, keepdim=True), found, 0.0)
