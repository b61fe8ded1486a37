"""Windows over a row of things that are worked on together: blocks of a model, or units of a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Blocks ``start .. stop`` are worked on together; those before ``leave`` are finished then."""

    start: int
    stop: int
    leave: int


def spans(stacks: Sequence[int], window: int, overlap: int) -> Iterator[Span]:
    """The windows over a model, in order; none reaches from one stack of blocks into the next."""
    first = 0
    for size in stacks:
        start, end = first, first + size
        while start < end:
            stop = min(start + window, end)
            leave = stop if stop == end else start + window - overlap
            yield Span(start, stop, leave)
            start = leave
        first = end
