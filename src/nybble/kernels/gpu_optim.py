# mypy: allow-untyped-calls
"""Optimizer steps on a GPU, in Triton: all tensors of a group in one launch, in four where states are kept by rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nybble.granularity.rank1 import Rank1
from nybble.kernels import _gpu_states as states
from nybble.kernels._gpu_blocks import EXACT, on
from nybble.kernels._gpu_step import (
    ASIDE,
    BFLOAT16,
    CODES1,
    CODES2,
    COLUMNS2,
    COUNT,
    FLOAT16,
    FLOAT32,
    RESIDUAL,
    ROW,
    SCALE1,
    SCALE2,
    TOP_COLUMNS,
    TOP_ROWS,
    WIDTH,
    P,
    factors_kernel,
    maxima_kernel,
    step_kernel,
)
from nybble.kernels._steps import FIRST, RULES, number_refusal, numbers, place_state, refusal, target_of
from nybble.optim._forms import forms
from nybble.optim._fused import Launch, Member, Spec, find_kernel
from nybble.optim._states import quantizer
from nybble.optim._weights import WEIGHTS, random_bits
from nybble.qtensor.block import BlockQTensor

WARPS = 4
REGISTERS: int | None = None
"""Of a thread of a step at most; 0 leaves them to the compiler, None takes :data:`FASTEST`."""
FASTEST = {32: None, 8: 96, 4: 80}
"""Registers by the bits of a state, on an H200 (benchmarks/optimizers.py --variants)."""
SHARED = True
"""Whether tables of values and thresholds are read through shared memory."""
BYTES = 16
"""Of a parameter that a thread reads at once: its codes and its numbers are then of the same elements."""
STEPS, MAXIMA = 8, 16
"""Tiles that a program steps one after another, and those whose maxima it takes."""
TILE = 2048
"""Of rows' and columns' factors."""
RECTANGLES = (256, 128)
"""Columns that a tile of a matrix may have; the last is that of maxima."""
DTYPES = {torch.float32: FLOAT32.value, torch.bfloat16: BFLOAT16.value, torch.float16: FLOAT16.value}
_ALIGNED = 16


@dataclass(frozen=True)
class Forms:
    """Both states as kernels keep them; ``rank1``: whether the second is kept by rows and columns."""

    one: states.Form
    two: states.Form
    rank1: bool
    tile: int

    @property
    def registers(self) -> int | None:
        """Of a thread at most."""
        return FASTEST[min(form.meta[1] if form.meta[0] > states.WIDE else 32 for form in (self.one, self.two))]

    @property
    def rows(self) -> int:
        """Of a rectangle whose maxima are taken."""
        return max(1, self.tile // RECTANGLES[-1])


@dataclass
class Table:
    """Addresses and tiles of one launch, on the GPU, and what they were made of.

    Attributes:
        members: in the order of rows. places: addresses of parameters and gradients that were written last.
        rows: int64 [tensors, ROW]. given: int64 [tensors, 2]. work: int32 [tiles, 2].
        maxima: int32 [tiles, 2], of the first pass; factors: int32 [tiles, 2]; tops: int32, raw maxima.
        aligned: whether all addresses and lengths are multiples of 16. columns: of a tile that is a rectangle, else 0.
        short: whether a block ends before the others do.
    """

    members: list[Member]
    places: list[int]
    rows: Tensor
    work: Tensor
    aligned: bool
    columns: int
    short: bool
    given: Tensor = field(default_factory=lambda: torch.empty(0))
    given_places: list[int] = field(default_factory=list)
    maxima: Tensor | None = None
    factors: Tensor | None = None
    tops: Tensor | None = None


class Steps:
    """See :class:`nybble.optim._fused.Kernel`."""

    refusal = staticmethod(refusal)
    number_refusal = staticmethod(number_refusal)

    def name(self, spec: Spec) -> str:
        """What is run."""
        passes = "two passes" if self._forms(spec).rank1 else "one pass"
        return f"Triton step over all tensors, {passes}"

    @staticmethod
    def draws(params: Sequence[Tensor], generators: Sequence[torch.Generator]) -> list[Tensor]:
        """int32, by the device's generators."""
        return [random_bits(p, each) for p, each in zip(params, generators, strict=True)]

    def run(self, launch: Launch) -> None:
        """Step all members in few launches."""
        for whole in (True, False):
            found = [k for k, m in enumerate(launch.members) if _whole(m, launch.grads[k]) == whole]
            if found:
                self._run(launch, found, whole)

    def _run(self, launch: Launch, which: list[int], aligned: bool) -> None:
        spec, kept = launch.spec, self._forms(launch.spec)
        members = [launch.members[k] for k in which]
        table = launch.held.get(("table", aligned))
        places = [m.p.data_ptr() for m in members]
        if table is None or table.members != members or table.places != places:
            table = launch.held["table", aligned] = _table(spec, kept, members, places, aligned)
        given = [launch.grads[k].data_ptr() for k in which]
        draws = None if launch.draws is None else [launch.draws[k].data_ptr() for k in which]
        if given != table.given_places or draws is not None:
            pairs = np.stack([given, draws or [0] * len(given)], 1)
            table.given = torch.from_numpy(pairs).to(spec.device, non_blocking=True)
            table.given_places = given
        with on(members[0].p):
            _launch(launch, kept, table)

    def _forms(self, spec: Spec) -> Forms:
        found = [_form(line, name, spec.device) for name, _, line in spec.states]
        absent = states.form_of(states.ABSENT, "dynamic8", 16, "nearest-even", False, 1.0, spec.device)
        one = next((f for f, (name, _, _) in zip(found, spec.states, strict=True) if name in FIRST), absent)
        two = next((f for f, (name, _, _) in zip(found, spec.states, strict=True) if name not in FIRST), absent)
        tile = max(
            BYTES // spec.dtype.itemsize * 32 * WARPS,
            *(f.meta[2] for f in (one, two) if f.meta[0] == states.BLOCKS),
            16,
        )
        return Forms(one, two, two.meta[0] == states.RANK1, tile)


def _form(line: str | None, name: str, device: torch.device) -> states.Form:
    if line is None:
        return states.form_of(states.WIDE, "dynamic8", 16, "nearest-even", False, 1.0, device)
    q = quantizer(line)
    kind = states.RANK1 if isinstance(q.granularity, Rank1) else states.BLOCKS
    size = getattr(q.granularity, "size", 16)
    return states.form_of(kind, q.format.name, size, q.rounding, q.reciprocal, target_of(line), device, SHARED)


def _whole(member: Member, grad: Tensor) -> bool:
    """Whether 16 elements at a time can be read: all of a parameter and its codes, or of their rows."""
    size = member.p.numel() if member.p.dim() != 2 else member.p.shape[1]
    if size % _ALIGNED or (member.p.data_ptr() | grad.data_ptr()) % _ALIGNED:
        return False
    codes = (x.codes for x in member.kept.values() if isinstance(x, BlockQTensor))
    return not any(x.data_ptr() % _ALIGNED for x in codes)


def _table(spec: Spec, kept: Forms, members: list[Member], places: list[int], aligned: bool) -> Table:
    rows = np.zeros((len(members), ROW), np.int64)
    for row, member, place in zip(rows, members, places, strict=True):
        row[P], row[COUNT], row[ASIDE] = place, member.p.numel(), member.count
        row[WIDTH] = member.p.shape[1] if member.p.dim() == 2 else member.p.numel()
        row[RESIDUAL] = 0 if member.residual is None else member.residual.data_ptr()
        for name, state in member.kept.items():
            place_state(row, state, *((CODES1, SCALE1) if name in FIRST else (CODES2, SCALE2)), COLUMNS2)
    tops = _add_maxima(rows, spec.device) if kept.rank1 else None
    count, width = rows[:, COUNT], rows[:, WIDTH]
    columns = _columns(kept, width)
    tiles = -(-count // (kept.tile * STEPS))
    if columns:
        tiles = -(-(count // width) // (kept.tile // columns * STEPS)) * (width // columns)
    table = Table(
        members,
        places,
        torch.from_numpy(rows).to(spec.device),
        _tiles(tiles, spec.device),
        aligned,
        columns,
        bool((count % max(kept.one.meta[2], kept.two.meta[2])).any()),
    )
    if tops is not None:
        height = count // width
        table.tops = tops
        table.maxima = _tiles(-(-height // (kept.rows * MAXIMA)) * -(-width // RECTANGLES[-1]), spec.device)
        table.factors = _tiles(-(-(height + width) // TILE), spec.device)
    return table


def _columns(kept: Forms, width: Any) -> int:
    """Columns of tiles that are rectangles, where scales are of rows and columns and all widths allow it."""
    block = kept.one.meta[2] if kept.one.meta[0] == states.BLOCKS else 16
    return next((c for c in RECTANGLES if kept.rank1 and c >= block and not (width % c).any()), 0)


def _add_maxima(rows: Any, device: torch.device) -> Tensor:
    """Room for the raw maxima of all rows and columns."""
    height, width = rows[:, COUNT] // rows[:, WIDTH], rows[:, WIDTH]
    ends = np.cumsum(height + width)
    tops = torch.zeros(int(ends[-1]), dtype=torch.int32, device=device)
    rows[:, TOP_ROWS] = tops.data_ptr() + 4 * (ends - height - width)
    rows[:, TOP_COLUMNS] = rows[:, TOP_ROWS] + 4 * height
    return tops


def _tiles(count: Any, device: torch.device) -> Tensor:
    """int32 [tiles, 2]: a tensor's row in the table, and the number of one of its ``count`` tiles."""
    row = np.repeat(np.arange(len(count)), count)
    number = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    return torch.from_numpy(np.stack([row, number], 1).astype(np.int32)).to(device)


def _launch(launch: Launch, kept: Forms, table: Table) -> None:
    spec, options, step = launch.spec, launch.options, launch.step
    found = forms(spec.device)
    assert found is not None
    rate, shrink, decay, b1, a1, b2, a2, root, inverse, eps, initial = numbers(spec.rule, options, step).all(found.div)
    one, two, meta = kept.one, kept.two, found.meta()
    dtype, rule, weights = DTYPES[spec.dtype], RULES.index(spec.rule), WEIGHTS.index(spec.weights)
    decays, first = options.weight_decay != 0, step == 1 and spec.rule in ("sgd", "adagrad")
    if kept.rank1:
        assert table.maxima is not None and table.tops is not None
        table.tops.zero_()
        maxima_kernel[(len(table.maxima),)](
            table.rows, table.given, table.maxima, two.values, decay, b2, a2, initial, RULE=rule, FORMS=meta,
            TWO=two.meta, DTYPE=dtype, GRADIENT=dtype, WEIGHTS=weights, DECAY=decays, FIRST=first,
            ALIGNED=table.aligned, ROWS=kept.rows,
            COLUMNS=RECTANGLES[-1], TILES=MAXIMA, WHOLE=table.columns > 0, num_warps=WARPS, **EXACT,
        )  # fmt: skip
    step_kernel[(len(table.work),)](
        table.rows, table.given, table.work, one.values, one.thresholds, one.way.codes, two.values, two.thresholds,
        two.way.codes, rate, shrink, decay, b1, a1, b2, a2, root, inverse, eps, initial, RULE=rule, FORMS=meta,
        ONE=one.meta, TWO=two.meta, DTYPE=dtype, GRADIENT=dtype, WEIGHTS=weights, GUARD=spec.guarded,
        DECAY=decays, FIRST=first,
        NESTEROV=getattr(options, "nesterov", False), ALIGNED=table.aligned, COLUMNS=table.columns,
        SHORT=table.short, TILE=kept.tile, TILES=STEPS, num_warps=WARPS,
            maxnreg=kept.registers if REGISTERS is None else REGISTERS or None, **EXACT,
    )  # fmt: skip
    if kept.rank1:
        assert table.factors is not None
        factors_kernel[(len(table.factors),)](
            table.rows, table.factors, ZERO=two.meta[5], TILE=TILE, num_warps=WARPS, **EXACT
        )


KERNEL = Steps()


@find_kernel.register_kernel("cuda")
def kernel_of(device: torch.device) -> Steps:
    """See :data:`nybble.optim._fused.find_kernel`."""
    return KERNEL
