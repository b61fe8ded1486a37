"""A weight in codes on its way to less error: its grid values, and the scales, offsets and zero points under them.

All of it is always as it will be stored, and every move is judged so: the error of rows that share a scale never rises.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nybble.calibration.error import by_group
from nybble.qtensor import QTensor, QuantParams, dense
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.solvers._integers import Levels, by_column, by_row
from nybble.solvers._least_squares import Bands, Parts, steps


class Fitted:
    """See the module.

    Args:
        target: W, float32 [rows, columns].
        second: H, float32 [groups, columns, columns].
        quantizer: how W_hat is stored.
        packed: to begin with, stored so.

    Attributes:
        values: V, decoded codes less the zero point, float32 [rows, columns].
        movable: whether there is a scale a block.
        scale, offset, zero: of the blocks, float32 [blocks]; None where there is none.
    """

    def __init__(self, target: Tensor, second: Tensor, quantizer: Quantizer, packed: BlockQTensor) -> None:
        self.target, self.second, self.quantizer = target, second, quantizer
        plain = QuantParams(None, zero_point=packed.params.zero_point, grid=packed.params.grid)
        self.values, self._raw = replace(packed, params=plain).dequantize(), quantizer.soften(packed.params)
        scale, offset, zero = self._raw.scale, self._raw.offset, self._raw.zero_point
        self.movable = isinstance(scale, Tensor)
        self.scale = scale.reshape(-1) if isinstance(scale, Tensor) else target.new_zeros(0)
        self.offset = offset.reshape(-1) if isinstance(offset, Tensor) else None
        self.zero = zero.reshape(-1) if isinstance(zero, Tensor) else None
        if isinstance(scale, Tensor):
            numbers = torch.arange(scale.numel(), device=target.device).view(scale.shape)
            self._owner = packed.granularity.expand(numbers, packed.shape).expand(packed.shape).contiguous()
            self._bands = Bands.of(self._owner)

    # ------------------------------------------------------------------------------------------------ what it is now
    def raw(self) -> QuantParams:
        """Its parameters (:meth:`nybble.quantizer.Quantizer.soften`)."""
        if not self.movable:
            return self._raw
        assert isinstance(self._raw.scale, Tensor)
        shape = self._raw.scale.shape
        zero, offset = (None if t is None else t.view(shape) for t in (self.zero, self.offset))
        return replace(self._raw, scale=self.scale.view(shape), zero_point=zero, offset=offset)

    def packed(self) -> BlockQTensor:
        """As it is stored."""
        raw = self.raw()
        return self.quantizer.pack(self.quantizer.codes_of(self.values, raw), raw)

    def levels(self) -> Levels:
        """What each weight may become."""
        rows, columns = self.values.shape
        return Levels.of(self.quantizer, self.quantizer.harden(self.raw()), (rows, columns), len(self.second))

    def lost(self) -> Tensor:
        """``W - W_hat``, [rows, columns]."""
        return self.target - by_row(self.levels().dense(by_column(self.values, len(self.second)), slice(None)))

    def errors(self) -> Tensor:
        """Of every row, float64 [rows]."""
        lost = by_group(self.lost(), self.second)
        return ((lost @ self.second) * lost).sum(-1, dtype=torch.float64).flatten()

    @property
    def coarse(self) -> bool:
        """Whether parameters lose much when they are stored, or can't all be solved at once: :meth:`sweep` helps."""
        formats = (self.quantizer.scale_format, self.quantizer.offset_format if self.offset is not None else "float16")
        stepped = not torch.equal(self._allowed(self.scale * 1.25), self.scale * 1.25)
        plain = all(isinstance(fmt, str) and fmt != "bfloat16" for fmt in formats)
        return not plain or stepped or self.zero is not None or self._bands is None

    # ------------------------------------------------------------------------------------------------ grid values
    def take(self, values: Tensor) -> None:
        """Other grid values [rows, columns], in the rows that lose less by them."""
        before, was = self.errors(), self.values
        self.values = values
        self.values = torch.where((self.errors() < before)[:, None], values, was)

    def shrink(self, shares: Tensor) -> None:
        """Begin with every block's range at the share that loses least by rounding, weighted with H's diagonal.

        Args:
            shares: of the range as it is, float32 [shares].
        """
        energy = self.second.diagonal(dim1=-2, dim2=-1)[..., None]
        target, scale, offset = by_column(self.target, len(self.second)), self.scale, self.offset
        best, least = torch.ones_like(scale), torch.full_like(scale, torch.inf, dtype=torch.float64)
        for share in (*shares.tolist(), None):
            by = best if share is None else torch.full_like(scale, share)
            self.scale, self.offset = self._allowed(scale * by), None if offset is None else offset * by
            levels = self.levels()
            values = levels.nearest(target, slice(None))
            error = self._by_block(by_row((target - levels.dense(values, slice(None))).square() * energy))
            best, least = torch.where(error < least, by, best), torch.minimum(error, least)
        self.values = by_row(values)

    def better(self, other: Fitted) -> None:
        """Take over what another did, in rows that share scales where it loses less."""
        ours, theirs = self.errors(), other.errors()
        if self._bands is None:
            blocks = torch.full_like(self.scale, float(theirs.sum()) < float(ours.sum()), dtype=torch.bool)
        else:
            blocks = self._bands.of_blocks(theirs) < self._bands.of_blocks(ours)
        rows = blocks[self._owner[:, 0]]
        self.values = torch.where(rows[:, None], other.values, self.values)
        for name in ("scale", "offset", "zero"):
            mine, its = getattr(self, name), getattr(other, name)
            setattr(self, name, None if mine is None else torch.where(blocks, its, mine))

    # ------------------------------------------------------------------------------------------------ parameters
    def solve(self) -> None:
        """All scales and offsets of rows that share some at once, where these rows lose less by them."""
        if self._bands is None:
            return
        before, scale, offset = self.errors(), self.scale, self.offset
        step = steps(self.values, self.lost(), self.second, self._bands, scale, offset is not None)
        self.scale = self._positive(self._allowed((scale + step[0]).float()), scale)
        if offset is not None:
            self.offset = (offset + step[1]).float()
        falls = self._bands.of_blocks(self.errors()) < self._bands.of_blocks(before)
        self.scale = torch.where(falls, self.scale, scale)
        if offset is not None and self.offset is not None:
            self.offset = torch.where(falls, self.offset, offset)

    def sweep(self) -> None:
        """Block by block the best stored scale, with its offset or zero point; what one loses the next make up for."""
        lost, self.values = self.lost(), self.values.clone()
        for part in Parts.of(self._owner):
            columns, inside = part.columns, part.inside
            value = torch.where(inside, self.values[:, columns], 0)
            ones = inside.float()
            pull = (by_group(lost, self.second) @ self.second[..., columns]).reshape(value.shape)
            inner = self.second[..., columns, :][..., columns]
            powers = [(by_group(x, inner) @ inner).reshape(value.shape) for x in (value, ones)]
            sums = [
                part.by_block(x, len(self.scale))
                for x in (value * pull, ones * pull, value * powers[0], ones * powers[0], ones * powers[1])
            ]
            more_scale, more_offset, shift = self._best(*sums)
            lost[:, columns] -= part.spread(more_scale) * value + part.spread(more_offset) * ones
            if self.zero is not None:
                self.values[:, columns] -= part.spread(shift) * ones

    def _best(self, to_value: Tensor, to_ones: Tensor, vv: Tensor, vi: Tensor, ii: Tensor) -> list[Tensor]:
        """Move every block of a part to its best parameters; what was added to W_hat's slope, its height, V's zero.

        All are float64 [blocks]: <V, (W - W_hat) H> and <1, (W - W_hat) H>; <V, V H>, <1, V H> and <1, 1 H>.
        """
        assert isinstance(self._raw.scale, Tensor)
        now, height = self._stored(self.scale, self.offset)
        gain = torch.zeros_like(now)
        moved = [torch.zeros_like(now) for _ in range(3)]
        scale, offset, zero = self.scale, self.offset, self.zero
        for shift in (0.0,) if zero is None else (0.0, -1.0, 1.0):
            # V - shift in place of V; of an offset, V less its mean under H
            if self.offset is None:
                lever, power = to_value - shift * to_ones, vv - 2 * shift * vi + shift**2 * ii
                wanted = now + (lever + shift * now * (vi - shift * ii)) / power
            else:
                wanted = now + (to_value - to_ones * vi / ii) / (vv - vi.square() / ii)
            tried = self._positive(self._allowed(wanted.float()), self.scale)
            there, _ = self._stored(tried, self.offset)
            more = there - now
            up = -shift * there
            height_tried = None
            if self.offset is not None:
                wanted = height + (to_ones - more * vi) / ii
                height_tried = torch.where(torch.isfinite(wanted), wanted, height).float()
                up = self._stored(tried, height_tried)[1] - height
            gained = 2 * (more * to_value + up * to_ones) - (more.square() * vv + 2 * more * up * vi + up.square() * ii)
            falls = gained > gain  # not where something is 0 / 0
            if self.zero is not None:
                fmt, to = self.quantizer.format, self.zero + shift
                falls &= (to >= fmt.min) & (to <= fmt.max)
                zero = torch.where(falls, to, zero)  # type: ignore[arg-type]
            gain, scale = torch.where(falls, gained, gain), torch.where(falls, tried, scale)
            if height_tried is not None:
                offset = torch.where(falls, height_tried, offset)  # type: ignore[arg-type]
            new = (more, up, torch.full_like(now, shift))
            moved = [torch.where(falls, x, y) for x, y in zip(new, moved, strict=True)]
        self.scale, self.offset, self.zero = scale, offset, zero
        return moved

    def _stored(self, scale: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
        """What a file would have of them, float64 [blocks] both; 0 for no offset."""
        assert isinstance(self._raw.scale, Tensor)
        shape = self._raw.scale.shape
        raw = replace(self._raw, scale=scale.view(shape), offset=None if offset is None else offset.view(shape))
        found = self.quantizer.harden(raw)
        assert isinstance(found.scale, Tensor | QTensor)
        wide = dense(found.scale).reshape(-1).double()
        return wide, torch.zeros_like(wide) if found.offset is None else dense(found.offset).reshape(-1).double()

    def _allowed(self, scale: Tensor) -> Tensor:
        return self.quantizer.scale.allowed(scale)

    def _positive(self, scale: Tensor, otherwise: Tensor) -> Tensor:
        """Scales that are stored as something above zero; where they would not be, others."""
        there = self._stored(torch.where(torch.isfinite(scale), scale, otherwise), self.offset)[0]
        return torch.where(torch.isfinite(scale) & torch.isfinite(there) & (there > 0), scale, otherwise)

    def _by_block(self, elements: Tensor) -> Tensor:
        total = torch.zeros(len(self.scale), dtype=torch.float64, device=elements.device)
        return total.index_add_(0, self._owner.flatten(), elements.flatten().double())
