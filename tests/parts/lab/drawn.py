"""A small sweep over random tensors, which run in a millisecond."""

from __future__ import annotations

from typing import Any

from nybble.lab.claim import Outcome
from nybble.lab.store import Store
from nybble.lab.sweep import Sweep, parse_sweep


def drawn(**grid: Any) -> Sweep:
    """Three runs, or those of a grid."""
    axes = {"weights": "int{bits} group=16", "bits": [2, 3, 4], **grid}
    return parse_sweep({"name": "drawn", "kind": "tensor", "base": {"rows": 2, "columns": 32}, "grids": [axes]})


def filled(place: str, **grid: Any) -> Store:
    """A store with the sweep queued."""
    store, sweep = Store(place), drawn(**grid)
    store.add(sweep.name, sweep.to_dict(), sweep.expand())
    return store


def done(**result: Any) -> Outcome:
    """A run that ended well."""
    return Outcome(state="done", result=result, seconds=1.0)
