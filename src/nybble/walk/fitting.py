"""Which settings make a run fit into memory that it doesn't fit into: found by estimating again, nothing is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from nybble.walk.steps import Load

FEWEST_SAMPLES, SHORTEST = 8, 128
"""Below these calibration says little: they are not proposed."""


class Change(NamedTuple):
    """Something that a user may set.

    Attributes:
        said: as it is set.
        load: the sizes that it comes to.
        window: whether windows are of one block.
    """

    said: str
    load: Load
    window: bool = False


def fitting(load: Load, free: int, memory: Callable[[Load, bool], int]) -> str:
    """A sentence or two on what fits, for a message.

    Args:
        load: of the run that doesn't fit.
        free: bytes.
        memory: what a run takes, in bytes; with windows of one block or as the recipe has them.
    """
    kinds = _kinds(load)
    alone = [next((c for c in changes if memory(c.load, c.window) <= free), None) for changes in kinds]
    found = [f"{c.said} ({memory(c.load, c.window) / 1e9:.1f} GB)" for c in alone if c is not None]
    if found:
        return f"Each of these fits by itself: {'; '.join(found)}."
    least = Change("", load)
    for changes in kinds:  # one kind after the other, each as far as it takes
        for change in changes:
            added = _both(least, change)
            if memory(added.load, added.window) <= free:
                return f"Together these fit: {added.said} ({memory(added.load, added.window) / 1e9:.1f} GB)."
        least = _both(least, changes[-1])
    if not least.said:
        return "No setting makes it smaller."
    return f"No setting is enough: with {least.said} it takes {memory(least.load, least.window) / 1e9:.1f} GB."


def _kinds(load: Load) -> list[list[Change]]:
    """What may be set, kind by kind from what costs least in quality; of each from the mildest on."""
    found = [[Change("window: 1 and overlap: 0 in the recipe", load, True)]] if load.window > 1 else []
    if not load.samples:
        return found
    batches = [Change(f"--batch {n}", replace(load, batch=n)) for n in _halves(min(load.batch, load.samples), 1)]
    spill = [] if load.spilled else [Change("--spill", replace(load, spilled=True))]
    samples = [Change(f"--samples {n}", replace(load, samples=n)) for n in _halves(load.samples, FEWEST_SAMPLES)]
    lengths = [Change(f"--seq-len {n}", replace(load, seq_len=n)) for n in _halves(load.seq_len, SHORTEST)]
    lengths = [] if load.sample else lengths  # of images there is none
    return found + [changes for changes in (batches, spill, samples, lengths) if changes]


def _halves(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def _both(one: Change, other: Change) -> Change:
    """Two changes of different kinds."""
    a, b = one.load, other.load
    load = replace(
        a,
        batch=min(a.batch, b.batch),
        spilled=a.spilled or b.spilled,
        samples=min(a.samples, b.samples),
        seq_len=min(a.seq_len, b.seq_len),
    )
    return Change(", ".join(said for said in (one.said, other.said) if said), load, one.window or other.window)
