"""Scenes with objects to detect, drawn: discs, squares and triangles on uneven, noisy ground, some partly covered.

Every scene has a generator of its own, so the first scenes of a longer source are those of a shorter one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nybble.core.errors import UsageError
from nybble.data.drawn import drawn, numbers
from nybble.data.text import Part

WORD = "scenes"
CLASSES = ("disc", "square", "triangle")
MOST = 5
"""Objects of a scene."""
APART = 0.3
"""The largest part of the smaller box that two objects share."""


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """What a source came to.

    Attributes:
        rows: ``image``, uint8 [size, size]; ``objects``, float32 [objects, 5]: class, then left, top, right and bottom
            in shares of the image. channels: that the model wants, all alike.
        source: the SRC. sha256: of all images and objects.
    """

    rows: tuple[dict[str, Any], ...]
    source: str
    sha256: str

    @property
    def targets(self) -> int:
        """Scenes."""
        return len(self.rows)

    def manifest(self) -> dict[str, Any]:
        """What stands beside every number from these examples."""
        objects = sum(len(row["objects"]) for row in self.rows)
        found = {"source": self.source, "sha256": self.sha256, "examples": len(self.rows), "targets": self.targets}
        return {**found, "objects": objects}


def load_scenes(src: str, part: Part, *, size: int, channels: int, classes: int) -> Scenes:
    """Draw what a SRC says.

    Args:
        src: ``scenes:COUNT[:SEED]``.
        part: to train on or to judge on.
        size: pixels a side.
        channels: of the model.
        classes: of the model, which must have one for each kind of object.

    Raises:
        UsageError: another SRC, or a model without room for the objects.
    """
    count, seed = drawn(src, WORD)
    if size < 24 or classes < len(CLASSES):
        raise UsageError(
            f"scenes have {len(CLASSES)} kinds of objects ({', '.join(CLASSES)}) and at least 24 pixels a side; the "
            f"model has {classes} classes and {size} pixels."
        )
    digest, rows = hashlib.sha256(), list[dict[str, Any]]()
    for at in range(count):
        image, objects = scene(numbers(WORD, seed, part, at), size)
        digest.update(image.tobytes() + objects.tobytes())
        rows.append({"image": image, "objects": objects, "channels": channels, "at": at})
    return Scenes(rows=tuple(rows), source=src, sha256=digest.hexdigest())


def scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene: uint8 [size, size], and float32 [objects, 5]; later objects cover earlier ones."""
    y, x = np.mgrid[:size, :size].astype(np.float64) + 0.5
    slope = rng.uniform(-40, 40, 2)
    image = rng.uniform(50, 140) + (slope[0] * (x / size - 0.5) + slope[1] * (y / size - 0.5))
    found: list[tuple[float, ...]] = []
    for _ in range(rng.integers(1, MOST + 1)):
        kind, half = int(rng.integers(len(CLASSES))), rng.uniform(0.08, 0.2) * size
        centre = rng.uniform(half, size - half, 2)
        box = np.array([*(centre - half), *(centre + half)]) / size
        if any(_shared(box, np.array(other[1:])) > APART for other in found):
            continue
        light = rng.choice([-1, 1]) * rng.uniform(35, 90)
        image = np.where(_inside(kind, x - centre[0], y - centre[1], half), image + light, image)
        found.append((kind, *box))
    image = image + rng.normal(0, 8, image.shape)
    return image.clip(0, 255).astype(np.uint8), np.array(found, np.float32)


def _inside(kind: int, x: np.ndarray, y: np.ndarray, half: float) -> np.ndarray:
    """Where an object is, of places relative to its centre; its box has sides of 2 ``half``."""
    if CLASSES[kind] == "disc":
        inside = x**2 + y**2 <= half**2
    elif CLASSES[kind] == "square":
        inside = np.maximum(abs(x), abs(y)) <= half
    else:
        inside = (abs(y) <= half) & (abs(x) <= (y + half) / 2)
    return np.asarray(inside)


def _shared(a: np.ndarray, b: np.ndarray) -> float:
    """What two boxes share, as a part of the smaller."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    return float(sides.clip(0).prod() / min((a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod()))


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Scenes as a batch.

    Returns:
        ``pixel_values``, float32 [rows, channels, size, size], -1 to 1; ``labels``, float32 [rows, most, 5], with
        class -1 behind the objects of a scene.
    """
    pixels = torch.stack([torch.from_numpy(row["image"]) for row in rows])[:, None].float() / 127.5 - 1
    labels = torch.full((len(rows), MOST, 5), -1.0)
    for i, row in enumerate(rows):
        labels[i, : len(row["objects"])] = torch.from_numpy(row["objects"])
    return {"pixel_values": pixels.expand(-1, rows[0]["channels"], -1, -1).contiguous(), "labels": labels}
