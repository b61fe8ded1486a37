"""Optimizer steps on a CPU by the compiled library: all tensors of a group in a call, in chunks that stay in cache."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nybble.formats import NumberFormat, get_format
from nybble.granularity.rank1 import Rank1
from nybble.kernels._draws import draws
from nybble.kernels._library import library, team
from nybble.kernels._rounders import cells
from nybble.kernels._steps import FIRST, RULES, line_refusal, number_refusal, numbers, place_state, refusal, target_of
from nybble.kernels._weights import DTYPES
from nybble.ops.rounding import decode_table
from nybble.optim._forms import ROOT_MODE, forms, vector_root_address
from nybble.optim._fused import Launch, Member, Spec, find_kernel
from nybble.optim._states import quantizer
from nybble.optim._weights import WEIGHTS

_CHUNK = 1024
_STRETCH = 32
"""Chunks that a thread takes at a time."""
_ISA = 3
_SETS = {0: "any processor", 2: "AVX2", 3: "AVX-512"}
_ABSENT, _WIDE, _BLOCKS, _RANK1 = range(4)
_POINTER, _NUMBER, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_NUMBERS = ("rate", "shrink", "decay", "b1", "a1", "b2", "a2", "root", "inverse", "eps", "initial")


class _Form(ctypes.Structure):
    _fields_ = (
        *((name, _NUMBER) for name in ("kind", "bits", "block", "reciprocal", "zero")),
        *((name, _POINTER) for name in ("values", "halves", "cells", "tree", "leaves")),
        ("target", _FLOAT),
    )


class _Job(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("tensors", "work", "root_of")),
        ("one", _Form), ("two", _Form),
        *((name, _NUMBER) for name in (
            "count", "items", "stretch", "chunk", "rule", "dtype", "weights", "guard", "decays", "first", "nesterov",
            "root_mode",
        )),
        ("forms", _NUMBER * 7),
        *((name, _FLOAT) for name in _NUMBERS),
    )  # fmt: skip


P, G, CODES1, CODES2, SCALE1, SCALE2, COLUMNS, RESIDUAL, DRAWS, ASIDE, FRESH, COUNT, WIDTH = range(13)
"""Of a row of the table, which the library reads as a record of 64-bit words."""


@dataclass
class Table:
    """Addresses and chunks of one launch, and what they were made of.

    Attributes:
        members: in the order of rows. places: addresses of the parameters. rows: int64 [tensors, fields].
        work: int64 [items, 2], a tensor and its first element. fresh: float32, factors that are being measured.
    """

    members: list[Member]
    places: list[int]
    rows: Any
    work: Any
    fresh: Tensor


class Steps:
    """See :class:`nybble.optim._fused.Kernel`."""

    number_refusal = staticmethod(number_refusal)

    @staticmethod
    def refusal(spec: Spec) -> str | None:
        """Also where there is no library, or a format's thresholds lie too close for cells."""
        why = refusal(spec)
        if why is None and library() is None:
            return "no compiled library"
        if why is None and any(line is not None and _cells(line) is None for _, _, line in spec.states):
            return "a format with two thresholds in one cell"
        return why

    def name(self, spec: Spec) -> str:
        """What is run."""
        found = library()
        assert found is not None
        return f"compiled step over all tensors, {_SETS[min(_ISA, found.nybble_isa())]}"

    draws = staticmethod(draws)

    def run(self, launch: Launch) -> None:
        """Step all members in one call."""
        spec, options, members = launch.spec, launch.options, list(launch.members)
        table, places = launch.held.get("table"), [m.p.data_ptr() for m in members]
        one, two = forms_of(spec)
        stretch = _STRETCH * _chunk(one, two)
        if table is None or table.members != members or table.places != places:
            table = launch.held["table"] = _table(members, places, stretch, two.kind == _RANK1)
        table.rows[:, G] = [grad.data_ptr() for grad in launch.grads]
        if launch.draws is not None:
            table.rows[:, DRAWS] = [draw.data_ptr() for draw in launch.draws]
        if two.kind == _RANK1:
            table.fresh.zero_()
        found, call = forms(spec.device), library()
        assert found is not None and call is not None
        job = _Job(
            table.rows.ctypes.data, table.work.ctypes.data, vector_root_address() if found.sqrt else None, one, two,
            len(members), len(table.work), stretch, _chunk(one, two), RULES.index(spec.rule), DTYPES[spec.dtype],
            WEIGHTS.index(spec.weights), spec.guarded, options.weight_decay != 0, launch.step == 1,
            getattr(options, "nesterov", False), ROOT_MODE, (_NUMBER * 7)(*found.meta()),
            *numbers(spec.rule, options, launch.step).all(found.div),
        )  # fmt: skip
        if call.nybble_step(ctypes.addressof(job), torch.get_num_threads(), _ISA, team()):
            raise MemoryError("no memory for an optimizer's step.")


def _chunk(one: _Form, two: _Form) -> int:
    return max(_CHUNK, int(one.block), int(two.block))


def forms_of(spec: Spec) -> tuple[_Form, _Form]:
    """Both states as the library keeps them."""
    made = {name in FIRST: _form(line) for name, _, line in spec.states}
    return made.get(True, _Form(kind=_ABSENT)), made.get(False, _Form(kind=_ABSENT))


@lru_cache(maxsize=256)
def _form(line: str | None) -> _Form:
    if line is None:
        return _Form(kind=_WIDE)
    q, found = quantizer(line), _cells(line)
    assert found is not None
    kind = _RANK1 if isinstance(q.granularity, Rank1) else _BLOCKS
    values = decode_table(q.format.name, torch.device("cpu"))
    halves = values.view(torch.int16).view(-1, 2).T.contiguous()
    tree = _tree(q.format, q.rounding)
    tables = tuple(None if x is None else x.data_ptr() for x in (values, halves, found, *tree))
    block = getattr(q.granularity, "size", 1)
    form = _Form(kind, q.format.bits, block, q.reciprocal, q.format.has_zero, *tables, target_of(line))
    form.kept = (values, halves, found, tree)
    return form


@lru_cache(maxsize=256)
def _cells(line: str) -> Tensor | None:
    """int32 [65536], by the upper 16 bits of a number: two codes, and the lower bits up to which the first is right.

    Returns:
        the second code in bits 24 .. 31, the first in 16 .. 23, and the last of its lower bits in 0 .. 15.
    """
    if line_refusal(line) is not None:
        return None
    q = quantizer(line)
    found = cells(get_format(q.format.name).name, q.rounding)
    if found is None:
        return None
    edges, _, _, low, high = (x.roll(-32768).numpy() for x in found)  # positive numbers first, as bits count
    # Of negative numbers, the one with the larger bits is the smaller one; behind infinity come the NaNs.
    falls = (np.arange(65536) >= 32768) | np.isinf(edges)
    first, second = np.where(falls, high, low).astype(np.int64), np.where(falls, low, high).astype(np.int64)
    last = (edges.view(np.int32).astype(np.int64) & 0xFFFF) - ~falls
    first = np.where(np.isnan(edges), low, np.where(last < 0, second, first))
    second = np.where(np.isnan(edges), low, second)
    return torch.from_numpy((second << 24 | first << 16 | last.clip(0)).astype(np.uint32).view(np.int32))


def _tree(fmt: NumberFormat, rounding: str) -> tuple[Tensor | None, Tensor | None]:
    """Of a format of 4 bits: thresholds, float32 [16], the i-th's neighbours at 2 i and 2 i + 1; codes, uint8 [16].

    None where a code depends on more than the number of thresholds up to a value: a negative zero, a code for NaN.
    """
    if fmt.bits != 4 or fmt.negative_zero is not None or fmt.nan_code is not None:
        return None, None
    found = fmt.thresholds(rounding)
    thresholds = np.full(15, np.inf, np.float32)
    thresholds[: len(found)] = found
    order = [(2 * i + 1) * 2**-depth * 8 - 1 for depth in range(4) for i in range(2**depth)]
    codes = fmt.grid_codes[np.minimum(np.arange(16), len(found))].astype(np.uint8)
    tree = np.concatenate([np.zeros(1, np.float32), thresholds[np.array(order, np.int64)]])
    return torch.from_numpy(tree), torch.from_numpy(codes)


def _table(members: list[Member], places: list[int], stretch: int, rank1: bool) -> Table:
    rows = np.zeros((len(members), WIDTH + 1), np.int64)
    for row, member, place in zip(rows, members, places, strict=True):
        row[P], row[COUNT], row[ASIDE] = place, member.p.numel(), member.count
        row[WIDTH] = member.p.shape[1] if member.p.dim() == 2 else member.p.numel()
        row[RESIDUAL] = 0 if member.residual is None else member.residual.data_ptr()
        for name, state in member.kept.items():
            place_state(row, state, *((CODES1, SCALE1) if name in FIRST else (CODES2, SCALE2)), COLUMNS)
    sizes = rows[:, COUNT] // rows[:, WIDTH] + rows[:, WIDTH] if rank1 else rows[:, COUNT] * 0
    fresh = torch.zeros(int(sizes.sum()), dtype=torch.float32, device="cpu")
    rows[:, FRESH] = fresh.data_ptr() + 4 * (np.cumsum(sizes) - sizes)
    parts = -(-rows[:, COUNT] // stretch)
    tensor = np.repeat(np.arange(len(rows)), parts)
    first = (np.arange(len(tensor)) - np.repeat(np.cumsum(parts) - parts, parts)) * stretch
    return Table(members, places, rows, np.ascontiguousarray(np.stack([tensor, first], 1)), fresh)


KERNEL = Steps()


@find_kernel.register_kernel("cpu")
def kernel_of(device: torch.device) -> Steps:
    """See :data:`nybble.optim._fused.find_kernel`."""
    return KERNEL
