"""Loss curves as a few plain numbers: for manifests, from which reports draw."""

from __future__ import annotations

from collections.abc import Sequence

POINTS = 40
"""Of a loss curve, at most."""


def curve(losses: Sequence[float]) -> list[list[float]]:
    """A few dozen points ``[step, loss]`` of the losses of all steps: each the mean of as many neighbours."""
    width = -(-len(losses) // POINTS) if losses else 1
    pieces = [(start, losses[start : start + width]) for start in range(0, len(losses), width)]
    return [[start + (len(piece) - 1) / 2, short(sum(piece) / len(piece))] for start, piece in pieces]


def short(value: float) -> float:
    """Four digits: enough to draw, and a manifest stays small."""
    return float(f"{value:.4g}")
