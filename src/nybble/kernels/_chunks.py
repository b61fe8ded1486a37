"""Chunks that stay in a processor's cache: how an operator's elements are cut, and the memory that every chunk uses."""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

ALONE = 32_256  # elements: below torch's grain of 32,768, so the calling thread works alone
SHARED = 65_536  # elements a thread where all of torch's threads work, which wait for each other after every step
OWN_MAPPING = 32 << 20  # bytes from which malloc gives a tensor pages of its own, so that advice meets no neighbour
_own = threading.local()  # the calling thread's buffers


@dataclass(frozen=True)
class Buffers:
    """Memory for one chunk, float32: ``y`` holds the input of a rounder, all three may be overwritten."""

    y: Tensor
    a: Tensor
    b: Tensor


def parts(count: int, columns: int) -> Iterator[tuple[int, int]]:
    """``range(count)`` cut so that rows of ``columns`` elements make up chunks; asking for the next ends the last.

    Four small chunks on one thread show how fast that goes. Large ones on all threads follow, until one takes three
    times as long: then another process holds a core, and at every step all wait for the thread that lost it; small
    chunks finish.
    """
    threads = torch.get_num_threads()
    alone, shared = max(1, ALONE // columns), max(1, SHARED * threads // columns)
    alone_best, start, done = math.inf, 0, 0
    sharing, may_share = False, threads > 1 and count > shared
    begun = time.perf_counter()
    while start < count:
        stop = min(start + (shared if sharing else alone), count)
        yield start, stop
        now = time.perf_counter()
        took, begun, done = (now - begun) / (stop - start), now, done + 1
        start = stop
        if sharing:
            sharing = may_share = took <= 3 * alone_best
        else:
            alone_best = min(alone_best, took)
            sharing = may_share and done == 4


def cut(blocks: Tensor, divisor: Tensor, scale: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Chunks of all four, along blocks; also across them where they are few and long."""
    count, columns = blocks.shape
    if columns <= ALONE or scale.shape[1] != 1:
        for start, stop in parts(count, columns):
            by, s = (t if t.shape[0] == 1 else t[start:stop] for t in (divisor, scale))
            yield blocks[start:stop], by, s, out[start:stop]
        return
    for row in range(count):
        x, by, s, to = (t[row : row + 1] for t in (blocks, divisor, scale, out))
        for start, stop in parts(columns, 1):
            yield x[:, start:stop], by, s, to[:, start:stop]


def buffers(rows: int, columns: int) -> Buffers:
    """This thread's buffers of shape [rows, columns]; the next call gives the same memory."""
    shape = (3, rows, columns)
    if rows * columns > SHARED * torch.get_num_threads():
        return Buffers(*torch.empty(shape))
    if getattr(_own, "shape", None) != shape:
        if getattr(_own, "size", 0) < rows * columns:
            _own.size, _own.memory = rows * columns, torch.empty(3, rows * columns)
        _own.shape, _own.chunk = shape, Buffers(*_own.memory[:, : rows * columns].view(shape))
    chunk: Buffers = _own.chunk
    return chunk


def empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory for a result; a large one in huge pages where Linux has them, touched at once and on all threads.

    The first touch of 4,096-byte pages, one chunk at a time, costs as much as all the sums.
    """
    out = torch.empty(shape, dtype=dtype)
    advise = _madvise()
    if advise is not None and out.nbytes >= OWN_MAPPING:
        start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(start, out.data_ptr() + out.nbytes - start, mmap.MADV_HUGEPAGE)  # advice: refused, it changes nothing
        out.view(-1)[:: 1024 // out.element_size()].zero_()
    return out


@lru_cache(maxsize=1)
def _madvise() -> Callable[[int, int, int], int] | None:
    """madvise(2), or None where there are no huge pages to ask for."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    found: Callable[[int, int, int], int] = advise
    return found
