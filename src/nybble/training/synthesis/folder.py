"""Rounds of images in a folder, a file each, so that a killed run goes on behind the last; and all in one file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nybble.core.files import atomic_write_bytes
from nybble.core.guard import reading
from nybble.core.progress import Progress, task
from nybble.training.synthesis.images import Made, Maker, middle


def made_in(maker: Maker, folder: Path, progress: Progress) -> list[list[Made]]:
    """The kept rounds of each batch; those whose file is there are read."""
    options, found = maker.options, list[list[Made]]()
    steps = options.half_steps + options.full_steps
    with task(progress, options.batches * options.rounds * steps, "updates of images") as bar:
        for batch in range(options.batches):
            rounds: list[Made] = []
            for number in range(options.rounds):
                file = folder / f"made-{batch}-{number}.npz"
                if file.exists():
                    rounds.append(_read(file))
                    bar.advance(steps)
                    continue
                before = rounds[-1].logits if rounds else None
                rounds.append(maker.make(batch, number, before, lambda n, loss: bar.advance(n, f"loss {loss:.3f}")))
                _write(file, rounds[-1])
            found.append(rounds if options.keep == "all" else rounds[-1:])
    return found


def clear(folder: Path) -> None:
    """Remove the files of rounds."""
    for path in folder.glob("made-*.npz"):
        path.unlink()


def write_images(maker: Maker, made: Sequence[Sequence[Made]], path: Path) -> tuple[Tensor, Tensor]:
    """The first ``count`` images, batches in turn and of each its rounds in turn, for :mod:`nybble.data.images`.

    Returns:
        labels, int64 [count]; logits, float32 [count, classes].
    """
    flat = [each for rounds in made for each in rounds]
    images, labels, logits = (
        torch.cat([getattr(each, name) for each in flat])[: maker.options.count]
        for name in ("images", "labels", "logits")
    )
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=stored(maker, images), labels=labels.numpy(), logits=logits.numpy())
    atomic_write_bytes(path, buffer.getvalue())
    return labels, logits


def stored(maker: Maker, images: Tensor) -> np.ndarray:
    """As the file has them: uint8 [N, H, W], with channels behind where there are several."""
    if maker.options.store == "window":
        images = middle(images.permute(0, 3, 1, 2), maker.window).permute(0, 2, 3, 1)
    found = images[..., 0] if images.shape[-1] == 1 else images
    return np.ascontiguousarray(found.numpy())


def _write(file: Path, made: Made) -> None:
    buffer = io.BytesIO()
    told = np.array([made.loss, made.distance])
    np.savez(buffer, images=made.images, labels=made.labels, logits=made.logits, told=told)
    atomic_write_bytes(file, buffer.getvalue())


def _read(file: Path) -> Made:
    with reading(str(file)), np.load(file, allow_pickle=False) as held:
        images, labels, logits = (torch.from_numpy(held[key]) for key in ("images", "labels", "logits"))
        loss, distance = held["told"].tolist()
    return Made(images=images, labels=labels, logits=logits, loss=loss, distance=distance)
