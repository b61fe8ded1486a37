"""Mixtures of two voices to separate, drawn: harmonics of a gliding pitch under formants that change by syllable.

One voice is low, one high, and each has formants of its own; no package or recording is needed, so these are voices of
a kind, not of people. Every mixture has a generator of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nybble.data.drawn import drawn, numbers
from nybble.data.text import Part

WORD = "voices"
SECONDS = 1.0
PITCHES = ((85.0, 155.0), (170.0, 280.0))
"""Hertz, of low and of high voices."""
FORMANTS = ((300.0, 850.0), (900.0, 2300.0), (2300.0, 3200.0))
"""Hertz: the ranges of the three that a syllable has."""


@dataclass(frozen=True, kw_only=True)
class Voices:
    """What a source came to.

    Attributes:
        rows: ``voices``, float32 [2, samples]; their sum is the mixture.
        source: the SRC. sha256: of all voices. rate: samples a second.
    """

    rows: tuple[dict[str, Any], ...]
    source: str
    sha256: str
    rate: int

    @property
    def targets(self) -> int:
        """Mixtures."""
        return len(self.rows)

    def manifest(self) -> dict[str, Any]:
        """What stands beside every number from these examples."""
        found = {"source": self.source, "sha256": self.sha256, "examples": len(self.rows), "targets": self.targets}
        return {**found, "rate": self.rate, "seconds": SECONDS}


def load_voices(src: str, part: Part, *, rate: int) -> Voices:
    """Draw what a SRC says.

    Args:
        src: ``voices:COUNT[:SEED]``.
        part: to train on or to judge on.
        rate: samples a second.

    Raises:
        UsageError: another SRC.
    """
    count, seed = drawn(src, WORD)
    digest, rows = hashlib.sha256(), list[dict[str, Any]]()
    for at in range(count):
        rng = numbers(WORD, seed, part, at)
        pair = np.stack([voice(rng, pitches, rate) for pitches in PITCHES])
        pair *= 10 ** (rng.uniform(-2.5, 2.5, (2, 1)) / 20)  # up to 5 dB apart
        digest.update(pair.astype("<f4").tobytes())
        rows.append({"voices": pair.astype(np.float32), "at": at})
    return Voices(rows=tuple(rows), source=src, sha256=digest.hexdigest(), rate=rate)


def voice(rng: np.random.Generator, pitches: tuple[float, float], rate: int) -> np.ndarray:
    """One voice, float64 [samples], of root mean square 0.1."""
    samples = int(SECONDS * rate)
    time = np.arange(samples) / rate
    ends = np.sort(rng.uniform(0.1, 0.9, rng.integers(2, 5))) * SECONDS
    syllable = np.searchsorted(ends, time)
    pitch = rng.uniform(*pitches) * (1 + 0.15 * np.interp(time, [0, *ends, SECONDS], rng.uniform(-1, 1, len(ends) + 2)))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    formants = np.array([[rng.uniform(*span) for span in FORMANTS] for _ in range(len(ends) + 1)])[syllable]
    loud = np.interp(time, np.linspace(0, SECONDS, 12), rng.uniform(0.05, 1, 12))
    found = np.zeros(samples)
    for number in range(1, int(rate / 2 / pitches[0])):
        hertz = number * pitch
        heard = (1 / (1 + ((hertz[:, None] - formants) / 120.0) ** 2)).sum(1) / number**0.5
        found += np.where(hertz < rate / 2, heard, 0) * np.sin(number * phase + rng.uniform(0, 2 * np.pi))
    found = found * loud + rng.normal(0, 1e-3, samples)
    return np.asarray(0.1 * found / np.sqrt(np.mean(found**2)))


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Mixtures as a batch: ``input_values``, float32 [rows, samples]; ``labels``, the voices [rows, 2, samples]."""
    labels = torch.stack([torch.from_numpy(row["voices"]) for row in rows])
    return {"input_values": labels.sum(1), "labels": labels}
