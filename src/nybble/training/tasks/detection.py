"""Detectors of objects in scenes that are drawn (:mod:`nybble.data.scenes`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nybble.core.progress import Progress, task
from nybble.data.labelled import class_names
from nybble.data.samples import Origin
from nybble.data.scenes import Scenes, collate, load_scenes
from nybble.data.text import Part
from nybble.nn.in_place import evaluation_mode
from nybble.training.measures import SHOWN
from nybble.training.tasks import Row, Task

TYPE = "nybble-detector"


class Detection(Task):
    """See the module.

    Metrics: ``loss``, of classes and boxes, and ``map50``, average precision at an overlap of a half, mean of classes.
    """

    summary: ClassVar[str] = "detectors of objects, on drawn scenes"
    unit: ClassVar[str] = "scenes"
    shown: ClassVar[str] = "map50"

    def claims(self, model: nn.Module) -> bool:  # noqa: D102
        return getattr(getattr(model, "config", None), "model_type", "") == TYPE

    def check(self, model: nn.Module, name: str, seq_len: int) -> None:  # noqa: D102
        pass

    def load(self, src: str, origin: Origin, model: nn.Module, seq_len: int, part: Part) -> Scenes:  # noqa: D102
        config = origin.config
        return load_scenes(
            src, part, size=config.image_size, channels=config.num_channels, classes=config.num_labels
        )  # fmt: skip

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:  # noqa: D102
        return collate(rows)

    def measure(  # noqa: D102
        self, model: nn.Module, origin: Origin, rows: Sequence[Row], batch: int, progress: Progress
    ) -> dict[str, float]:
        from nybble.training.tasks._boxes import average_precision

        found, lost = list[Tensor](), 0.0
        with task(progress, -(-len(rows) // batch), "held-out scenes"):
            for part, loss, objects in _batches(model, rows, batch):
                found += objects
                lost += loss * len(part)
                progress.advance()
        wanted = [torch.from_numpy(row["objects"]) for row in rows]
        return {"loss": lost / len(rows), "map50": average_precision(found, wanted)}

    def samples(self, model: nn.Module, origin: Origin, rows: Sequence[Row]) -> list[dict[str, str]]:  # noqa: D102
        asked: Any = model
        names, shown = class_names(asked.config), rows[:SHOWN]
        ((_, _, objects),) = _batches(model, shown, SHOWN)
        return [
            {
                "prompt": f"scene {row['at']}",
                "text": _listed(names, found[found[:, 1] >= 0.5][:, [0, 2, 3, 4, 5]]),
                "target": _listed(names, torch.from_numpy(row["objects"])),
            }
            for row, found in zip(shown, objects, strict=True)
        ]


def _listed(names: Sequence[str], objects: Tensor) -> str:
    """Objects by name and centre, in per cent of the image."""
    words = [
        f"{names[int(kind)]} {50 * (left + right):.0f},{50 * (top + bottom):.0f}"
        for kind, left, top, right, bottom in sorted(objects.tolist())
    ]
    return "; ".join(words) or "nothing"


@torch.no_grad()
def _batches(model: nn.Module, rows: Sequence[Row], batch: int) -> Iterator[tuple[Sequence[Row], float, list[Tensor]]]:
    """Some scenes, their mean loss, and what is found in each."""
    from nybble.training.tasks._boxes import found_in

    first = next(p for p in model.parameters() if p.is_floating_point())
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        given = collate(part)
        pixels = given["pixel_values"].to(first.device, first.dtype)
        with evaluation_mode(model):
            output = model(pixel_values=pixels, labels=given["labels"].to(first.device))
        cells = zip(output.logits.float().cpu(), output.boxes.float().cpu(), strict=True)
        yield part, float(output.loss), [found_in(logits, boxes) for logits, boxes in cells]


PART = Detection()
