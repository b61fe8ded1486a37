"""A run that a worker has claimed, and what became of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nybble.lab.spec import RunSpec

State = Literal["queued", "running", "done", "failed", "illegal"]
LEASE = 60.0
"""Seconds for which a claim holds without a word from its worker."""
ATTEMPTS = 3
"""How many workers a run may cost."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Attributes: ``number`` of the run, ``key``, ``worker``, ``attempt`` (together what it is known by), ``spec``."""

    number: int
    key: str
    worker: str
    attempt: int
    spec: RunSpec


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a run.

    Attributes:
        state: ``done``, ``failed`` or ``illegal``. result: names to numbers, texts or None. error: why it isn't done.
        seconds: that it took. environment: versions and hardware.
    """

    state: State
    result: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    seconds: float = 0.0
    environment: Mapping[str, Any] = field(default_factory=dict)


_INFINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def packed(result: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it: databases refuse infinities and NaN in it."""
    return {
        name: {"float": str(value)} if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in result.items()
    }


def unpacked(result: Mapping[str, Any] | None) -> dict[str, Any]:
    """Inverse of :func:`packed`."""
    return {
        name: _INFINITE[value["float"]] if isinstance(value, dict) and "float" in value else value
        for name, value in (result or {}).items()
    }
