"""Images with a class each to training examples of an image classifier; pictures are opened when a batch wants them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from nybble.core.errors import DataError
from nybble.data.images import ImageSet, Pictures, Preparation, numbered, prepared, read_images


class Rows(Sequence[Mapping[str, Any]]):
    """Examples by number: ``images``, ``at`` (the picture's place there), ``label``, and what the model ``wants``."""

    def __init__(self, images: Pictures, labels: Sequence[int], wants: Preparation) -> None:
        self.images, self.labels, self.wants = images, labels, wants

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, at: int, /) -> Mapping[str, Any]: ...

    @overload
    def __getitem__(self, at: slice, /) -> Sequence[Mapping[str, Any]]: ...

    def __getitem__(self, at: int | slice, /) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        return {"images": self.images, "at": at, "label": self.labels[at], "wants": self.wants}


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """What a source came to.

    Attributes:
        rows: the examples, in order.
        source: the SRC. note: what they are. sha256: of all pixels and labels, and of how they are prepared.
    """

    rows: Rows
    source: str
    note: str
    sha256: str

    @property
    def targets(self) -> int:
        """Images: each has one label."""
        return len(self.rows)

    def manifest(self) -> dict[str, Any]:
        """What stands beside every number from these examples; ``classes``: how many different labels there are."""
        found = {"source": self.source, "note": self.note, "sha256": self.sha256, "examples": len(self.rows)}
        wants, classes = self.rows.wants, len(set(self.rows.labels))
        size = [wants.channels, wants.height, wants.width]
        return {**found, "targets": self.targets, "classes": classes, "size": size}


def load_labelled_images(src: str, wants: Preparation, names: Sequence[str]) -> LabelledImages:
    """Read SRC as labelled images; every picture is opened once, so that a broken one is told of at once.

    Args:
        src: what :mod:`nybble.data.images` reads, with labels.
        wants: size and normalisation of the model.
        names: its classes by number. Folders that bear them are these classes; others count in their own order.

    Raises:
        UsageError: a SRC of another kind. FileError: it can't be read. DataError: no images, no labels, or one that
            the model has no class for.
    """
    found = numbered(read_images(src), names, src)
    if not len(found.images):
        raise DataError(f"data {src!r} holds no images.")
    labels = _labels(found, len(names), src)
    digest = hashlib.sha256(repr((wants, labels)).encode())
    for i in range(len(labels)):
        image = np.ascontiguousarray(found.images[i])
        digest.update(repr(image.shape).encode() + image.tobytes())
    rows = Rows(found.images, labels, wants)
    return LabelledImages(rows=rows, source=src, note=found.note, sha256=digest.hexdigest())


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Examples as a batch.

    Returns:
        ``pixel_values``, float32 [rows, channels, height, width]; ``labels``, int64 [rows].
    """
    pixels = [prepared(row["images"][row["at"]], row["wants"]) for row in rows]
    return {"pixel_values": torch.stack(pixels), "labels": torch.tensor([row["label"] for row in rows])}


def _labels(found: ImageSet, classes: int, src: str) -> list[int]:
    if found.labels is None:
        raise DataError(
            f"data {src!r} has no labels: give an IDX file with its labels beside it, an .npz with images and labels, "
            "or a folder with a folder for each class."
        )
    if not np.issubdtype(found.labels.dtype, np.integer):
        raise DataError(f"data {src!r} has labels of {found.labels.dtype}; they are numbers of classes: integers.")
    labels: list[int] = found.labels.astype(np.int64).tolist()
    wrong = next((i for i, label in enumerate(labels) if not 0 <= label < classes), None)
    if wrong is not None:
        raise DataError(
            f"data {src!r}, image {wrong}: label {labels[wrong]}, and the model's head has {classes} classes, 0 to "
            f"{classes - 1}. Take a model with more, or leave such images out."
        )
    return labels
