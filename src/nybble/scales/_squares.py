"""What the rule ``least-squares`` calculates: float32 blocks [blocks, elements], parameters [blocks, 1]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nybble.formats import NumberFormat
from nybble.ops.rounding import round_to
from nybble.scales import BlockParams, Storage

CHUNK = 1 << 17
"""Elements that are searched at a time: they and their copies stay in the cache."""


class Search(Protocol):
    """Options of the rule."""

    @property
    def offset(self) -> bool: ...
    @property
    def grid(self) -> int: ...
    @property
    def rounds(self) -> int: ...


def solve(
    search: Search,
    blocks: Tensor,
    fmt: NumberFormat,
    rounding: str,
    weight: Tensor | None,
    scales: Storage,
    offsets: Storage,
) -> BlockParams:
    """See :meth:`nybble.scales.least_squares.LeastSquares.fit`."""
    count, size = blocks.shape
    groups = scales.groups if scales.groups is not None else offsets.groups
    if groups is None:
        groups = torch.arange(count, device=blocks.device).view(-1, 1)
    if blocks.is_meta:  # sizes alone are asked for
        one, outer = blocks.new_empty(count, 1), blocks.new_empty(len(groups))
        return BlockParams(
            one,
            offset=one if search.offset else None,
            outer=None if scales.groups is None else outer,
            offset_outer=None if offsets.groups is None else outer,
        )
    kept: list[tuple[Tensor, ...]] = []
    step = max(1, CHUNK // max(1, size * groups.shape[1]))
    for some in torch.split(groups, step):
        x = blocks[some.reshape(-1)]
        unit = power_of_two(x.abs().amax(1).view(some.shape).amax(1, keepdim=True))
        x = x / unit.expand(some.shape).reshape(-1, 1)  # squares of what is huge or tiny stay numbers
        w = None if weight is None else weight.expand(blocks.shape)[some.reshape(-1)]
        kept.append(_Fit(x, w, some.shape[1], fmt, rounding, search, unit).run(scales, offsets))
    parts = [torch.cat(column) for column in zip(*kept, strict=True)]
    scale, offset = (torch.empty(count, 1, dtype=torch.float32, device=blocks.device) for _ in range(2))
    scale[groups.reshape(-1)], offset[groups.reshape(-1)] = parts[0], parts[1]
    top = torch.finfo(torch.float32).max
    scale = torch.where(blocks.isfinite().all(1, keepdim=True), scale.clamp(-top, top), scale)
    outer, offset_outer = parts[2][:, 0], parts[3][:, 0]
    return BlockParams(
        scale,
        offset=offset if search.offset else None,
        outer=None if scales.groups is None else outer,
        offset_outer=None if offsets.groups is None else offset_outer,
    )


@dataclass(frozen=True)
class _Sums:
    """Weighted sums over a block for given values v, [blocks, 1]: of v^2, v and x v."""

    vv: Tensor
    v: Tensor
    xv: Tensor


class _Fit:
    """Some blocks, over ``unit`` [blocks / share, 1]; ``share`` neighbours have one outer scale."""

    def __init__(
        self,
        x: Tensor,
        w: Tensor | None,
        share: int,
        fmt: NumberFormat,
        rounding: str,
        search: Search,
        unit: Tensor | None = None,
    ) -> None:
        self.unit = x.new_ones(len(x) // share, 1) if unit is None else unit
        self.x, self.share, self.fmt, self.rounding, self.search = x, share, fmt, rounding, search
        self.w = None if w is None else torch.where(w.amax(1, keepdim=True) > 0, w, 1.0)
        self.weight = x.new_full((len(x), 1), float(x.shape[1])) if self.w is None else self.w.sum(1, keepdim=True)
        self.wx = x if self.w is None else x * self.w
        self.sum_x = self.wx.sum(1, keepdim=True)

    # -------------------------------------------------------------------------------------------- one block
    def values(self, scale: Tensor, offset: Tensor | None) -> Tensor:
        """The nearest values of the format."""
        y = self.x if offset is None else self.x - offset
        return nearest(y / torch.where(scale == 0, 1.0, scale), self.fmt, self.rounding)

    def sums(self, v: Tensor) -> _Sums:
        """See _Sums."""
        wv = v if self.w is None else v * self.w
        return _Sums((wv * v).sum(1, keepdim=True), wv.sum(1, keepdim=True), (self.wx * v).sum(1, keepdim=True))

    def error(self, v: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        """Of each block, [blocks, 1]."""
        lost = torch.addcmul(self.x, v, scale, value=-1)
        lost = lost if offset is None else lost - offset
        square = lost.square() if self.w is None else lost.square().mul_(self.w)
        return square.sum(1, keepdim=True)

    def best(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and offset for given values; where only negative offsets are kept, 0 instead of a positive one."""
        s = self.sums(v)
        if not self.search.offset:
            return _quotient(s.xv, s.vv), None
        det = self.weight * s.vv - s.v.square()
        scale = _quotient(self.weight * s.xv - self.sum_x * s.v, det)
        offset = _quotient(s.vv * self.sum_x - s.v * s.xv, det)
        bad = (det <= 1e-6 * self.weight * s.vv) | (offset > 0 if self.negative else offset.isnan())
        return torch.where(bad, _quotient(s.xv, s.vv), scale), torch.where(bad, 0.0, offset)

    negative = False

    def start(self) -> tuple[Tensor, Tensor | None]:
        """The best of all clip values, each solved for once; then of a little less and more around the middle."""
        best, found, shift = torch.full_like(self.sum_x, torch.inf), torch.zeros_like(self.sum_x), None
        for scale, offset in self._candidates():
            best, found, shift = self._better(self.values(scale, offset), best, found, shift)
        middle = (self.fmt.max + self.fmt.min) / 2
        for factor in (1.0, 0.97, 1.03, 0.99, 1.01):
            offset = None if shift is None else shift + (1 - factor) * middle * found
            best, found, shift = self._better(self.values(found * factor, offset), best, found, shift)
        return found, shift

    def _better(
        self, v: Tensor, best: Tensor, found: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        scale, offset = self.best(v)
        error = self.error(v, scale, offset)
        better = error < best
        if offset is not None:
            shift = torch.where(better, offset, offset if shift is None else shift)
        return torch.where(better, error, best), torch.where(better, scale, found), shift

    def _candidates(self) -> list[tuple[Tensor, Tensor | None]]:
        fmt, grid = self.fmt, self.search.grid
        low, high, span = fmt.min, fmt.max, fmt.max - fmt.min
        step = span / (2**fmt.bits - 1)
        reach = [-0.9 * step + i / (grid - 1) * (0.9 * step + span * 4 / 2**fmt.bits) for i in range(grid)]
        if self.search.offset:
            there = None if self.w is None else self.w > 0  # padding has weight 0
            top = (self.x if there is None else torch.where(there, self.x, -torch.inf)).amax(1, keepdim=True)
            bottom = (self.x if there is None else torch.where(there, self.x, torch.inf)).amin(1, keepdim=True)
            bottom = bottom.clamp(max=0) if self.negative else bottom
            scales = [(top - bottom) / (span + more) for more in reach]
            # a clipped block loses at both ends
            return [(s, bottom - s * low + (top - bottom - s * span).clamp(min=0) / 2) for s in scales]
        extreme = self.x.gather(1, self.x.abs().argmax(1, keepdim=True))
        found = [extreme / (low - more) for more in reach] if low < 0 else []
        if low >= 0 or (high != -low and grid > 2):
            found += [extreme / (high + more) for more in reach]
        return [(s, None) for s in found]

    # -------------------------------------------------------------------------------------------- as it is stored
    def run(self, scales: Storage, offsets: Storage) -> tuple[Tensor, ...]:
        """Scales, offsets [blocks, 1] and the outer scales of both [blocks / share, 1] (1 where there are none)."""
        self.negative = offsets.format is not None and not offsets.format.signed and self.search.offset
        scale, offset = self.start()
        sums = self.sums(self.values(scale, offset))
        first = _Level(scale, sums.vv, scales, self, negative=False, never_zero=self.fmt.has_zero)
        second = None
        if offset is not None:
            again = _quotient(self.sum_x - first.value * sums.v, self.weight)
            again = again.clamp(max=0) if self.negative else again
            second = _Level(again, self.weight, offsets, self, negative=self.negative)
        kept = self._state(first, second)
        best = torch.full((len(self.x) // self.share, 1), torch.inf, dtype=torch.float32, device=self.x.device)
        for turn in range(self.search.rounds + 1):
            values = self.values(first.value, None if second is None else second.value)
            error = self.error(values, first.value, None if second is None else second.value)
            total = error.view(-1, self.share).sum(1, keepdim=True)
            better = total < best
            best = torch.where(better, total, best)
            rows = better.expand(-1, self.share).reshape(-1, 1)
            now = self._state(first, second)
            kept = tuple(
                torch.where(rows if len(new) == len(rows) else better, new, old)
                for new, old in zip(now, kept, strict=True)
            )
            if turn == self.search.rounds:
                break
            if first.nested:
                error, values = self._neighbours(first, second, error, values)
            self._move(first, second, values)
        units = self.unit, self.unit.expand(-1, self.share).reshape(-1, 1)
        return tuple(part * units[i < 2] for i, part in enumerate(kept))

    def _state(self, first: _Level, second: _Level | None) -> tuple[Tensor, ...]:
        if second is None:
            return first.value, torch.zeros_like(first.value), first.outer, torch.ones_like(first.outer)
        return first.value, second.value, first.outer, second.outer

    def _move(self, first: _Level, second: _Level | None, values: Tensor) -> None:
        """All parts once, for given values; none of these steps raises the error."""
        sums = self.sums(values)
        for _ in range(2):
            free = sums.xv if second is None else sums.xv - second.value * sums.v
            first.fit(_quotient(free, sums.vv), sums.vv, free)
            if second is not None:
                free = self.sum_x - first.value * sums.v
                second.fit(_quotient(free, self.weight), self.weight, free)

    def _neighbours(self, first: _Level, second: _Level | None, error: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stored scales one code up or down, with their own best values and offsets, where that loses less."""
        for direction in (-1, 1):
            code = first.neighbour(direction)
            scale = code * first.spread
            offset = None if second is None else second.value
            v = self.values(scale, offset)
            if second is not None:
                sums = self.sums(v)
                moved = second.stored(_quotient(self.sum_x - scale * sums.v, self.weight))
                v = self.values(scale, moved * second.spread)
                offset = moved * second.spread
            trial = self.error(v, scale, offset)
            better = trial < error
            error, values = torch.where(better, trial, error), torch.where(better, v, values)
            first.code = torch.where(better, code, first.code)
            if second is not None:
                second.code = torch.where(better, moved, second.code)
        return error, values


class _Level:
    """Scales, or offsets, as they are stored: ``code * outer``, or plain (code: the value itself, outer: 1).

    Attributes:
        code: [blocks, 1]. outer: [blocks / share, 1].
    """

    def __init__(
        self, target: Tensor, weight: Tensor, storage: Storage, owner: _Fit, *, negative: bool, never_zero: bool = False
    ) -> None:
        share, grid = owner.share, owner.search.grid
        self.dtype, self.share, self.negative, self.unit = getattr(torch, storage.dtype), share, negative, owner.unit
        self.format = storage.format if storage.groups is not None else None
        self.outer = target.new_ones(len(target) // share, 1)
        if self.format is not None:
            rows, importance = target.view(-1, share), weight.view(-1, share)
            search = _Plain(grid)
            fit = _Fit(rows, importance, 1, self.format, "nearest-even", search)
            self.outer = self._narrow(fit.start()[0])
        self.least = 0.0  # a block of small values is as well zeros under a scale as anything under none
        if never_zero and self.format is not None:
            self.least = min(abs(float(value)) for value in self.format.grid if value)
        self.code = self.stored(target)

    @property
    def nested(self) -> bool:
        """Whether there are codes."""
        return self.format is not None

    @property
    def spread(self) -> Tensor:
        """The outer scales, [blocks, 1]."""
        return self.outer.expand(-1, self.share).reshape(-1, 1)

    @property
    def value(self) -> Tensor:
        """As it is stored, [blocks, 1]."""
        return self.code * self.spread

    def _narrow(self, x: Tensor) -> Tensor:
        if self.dtype == torch.float32:
            return x
        unit = self.unit if len(x) == len(self.unit) else self.unit.expand(-1, self.share).reshape(-1, 1)
        top = torch.finfo(self.dtype).max
        return (x * unit).clamp(-top, top).to(self.dtype).float() / unit

    def stored(self, target: Tensor) -> Tensor:
        """The code nearest to a value (or what plain ones are stored as)."""
        if self.format is None:
            return self._narrow(target)
        outer = self.spread
        wanted = target / torch.where(outer == 0, 1.0, outer)
        return self._some(nearest(wanted.clone(), self.format, "nearest-even"), wanted)

    def _some(self, code: Tensor, wanted: Tensor) -> Tensor:
        """Where the code is 0 and may not be, the smallest of the wanted sign."""
        assert self.format is not None
        if not self.least:
            return code
        sign = torch.where((wanted < 0) & (self.format.min < 0), -1.0, 1.0).to(wanted.dtype)
        return torch.where(code == 0, self.least * sign, code)

    def neighbour(self, direction: int) -> Tensor:
        """Codes one up or down, at the format's ends themselves."""
        assert self.format is not None
        if self.format.is_integer:
            return self._some((self.code + direction).clamp(self.format.min, self.format.max), self.code)
        step = self.code.abs() * 0.13 + (self.format.max - self.format.min) * 1e-3
        return self._some(nearest(self.code + direction * step, self.format, "nearest-even"), self.code)

    def fit(self, target: Tensor, weight: Tensor, free: Tensor) -> None:
        """Codes nearest to ``target``, the least error's; then the outer scale that is best for these codes.

        Args:
            target: [blocks, 1].
            weight: curvature of the error.
            free: ``target * weight``, exact where that is 0 / 0.
        """
        self.code = self.stored(target)
        if self.format is None:
            return
        power = (weight * self.code.square()).view(-1, self.share).sum(1, keepdim=True)
        best = (free * self.code).view(-1, self.share).sum(1, keepdim=True) / torch.where(power == 0, 1.0, power)
        best = self._narrow(best)
        fine = (power > 0) & torch.isfinite(best) & ((best <= 0) if self.negative else torch.ones_like(best).bool())
        self.outer = torch.where(fine, best, self.outer)


@dataclass(frozen=True)
class _Plain:
    """The search of an outer scale: no offset."""

    grid: int
    offset: bool = False
    rounds: int = 1


def nearest(y: Tensor, fmt: NumberFormat, rounding: str) -> Tensor:
    """Of the format's values; integers, ties to even, need no search in a table."""
    if fmt.is_integer and rounding == "nearest-even":
        grid = fmt.grid
        return y.round_().clamp_(float(grid[0]), float(grid[-1]))
    rounded: Callable[[Tensor, str, str], Tensor] = round_to
    return rounded(y.contiguous(), fmt.name, rounding)


def power_of_two(size: Tensor) -> Tensor:
    """The largest that is not above ``size``; 1 for 0 and for what is no number."""
    fine = torch.isfinite(size) & (size > 0)
    mantissa, exponent = torch.frexp(torch.where(fine, size, 1.0))
    return torch.ldexp(torch.ones_like(mantissa), exponent - 1)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, 0 for a divisor of 0."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))
