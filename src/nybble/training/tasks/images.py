"""Image classifiers: one class of several to an image; ResNet, MobileNetV2, ViT, DeiT and others of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.core.errors import ModelError, UsageError
from nybble.core.progress import Progress, task
from nybble.data.images import preparation_for
from nybble.data.labelled import class_names
from nybble.data.labelled_images import LabelledImages, collate, load_labelled_images
from nybble.data.samples import Origin
from nybble.data.text import Part
from nybble.models.adapter import reads_of
from nybble.nn.in_place import evaluation_mode
from nybble.training.measures import SHOWN
from nybble.training.tasks import Augment, Row, Task
from nybble.training.tasks._moves import parse_moves


class Images(Task):
    """See the module. Metrics: ``loss``, mean cross-entropy in nats, and ``accuracy``, a share of the examples."""

    summary: ClassVar[str] = "image classifiers, on images with a class each"
    unit: ClassVar[str] = "images"
    shown: ClassVar[str] = "accuracy"

    def claims(self, model: nn.Module) -> bool:  # noqa: D102
        named = any(kind.__name__.endswith("ForImageClassification") for kind in type(model).__mro__)
        return named and reads_of(model) == "images" and len(class_names(getattr(model, "config", None))) > 1

    def check(self, model: nn.Module, name: str, seq_len: int) -> None:  # noqa: D102
        asked: Any = model
        kind = getattr(asked.config, "problem_type", None)
        if kind not in (None, "single_label_classification"):
            raise ModelError(
                f"{name}: its config says problem_type {kind!r}, and classifiers are trained to one class an image; "
                "set it to 'single_label_classification', or train in a loop of your own."
            )

    def load(self, src: str, origin: Origin, model: nn.Module, seq_len: int, part: Part) -> LabelledImages:  # noqa: D102
        if src == "builtin":
            raise UsageError(
                "an image classifier is trained on images; give them with --data (an IDX file, .npz, or a folder with "
                "one for each class)."
            )
        wants = preparation_for(origin.config, origin.preprocessing())
        return load_labelled_images(src, wants, class_names(origin.config))

    def augmentation(self, line: str, rows: Sequence[Row]) -> Augment | None:  # noqa: D102
        wants = rows[0]["wants"]
        moves = parse_moves(line, (wants.height, wants.width))
        if moves is None:
            return None
        return lambda batch, drawn: {**batch, "pixel_values": moves(batch["pixel_values"], drawn)}

    def classes_of(self, rows: Sequence[Row]) -> list[int]:  # noqa: D102
        return [row["label"] for row in rows]

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:  # noqa: D102
        return collate(rows)

    def measure(  # noqa: D102
        self, model: nn.Module, origin: Origin, rows: Sequence[Row], batch: int, progress: Progress
    ) -> dict[str, float]:
        with task(progress, -(-len(rows) // batch), "held-out images"):
            parts = [(logits.cpu(), labels) for logits, labels in _batches(model, rows, batch, progress)]
        logits, labels = (torch.cat(each) for each in zip(*parts, strict=True))
        right = (logits.argmax(-1) == labels).double().mean()
        return {"loss": functional.cross_entropy(logits.double(), labels).item(), "accuracy": right.item()}

    def samples(self, model: nn.Module, origin: Origin, rows: Sequence[Row]) -> list[dict[str, str]]:  # noqa: D102
        asked: Any = model
        names, shown = class_names(asked.config), rows[:SHOWN]
        ((logits, _),) = _batches(model, shown, SHOWN, None)
        return [
            {"prompt": f"image {row['at']}", "text": names[found], "target": names[row["label"]]}
            for row, found in zip(shown, logits.argmax(-1).tolist(), strict=True)
        ]


@torch.no_grad()
def _batches(
    model: nn.Module, rows: Sequence[Row], batch: int, progress: Progress | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the model gives to rows, float32 [rows, classes], and their labels."""
    first = next(p for p in model.parameters() if p.is_floating_point())
    for start in range(0, len(rows), batch):
        given = collate(rows[start : start + batch])
        with evaluation_mode(model):
            logits = model(pixel_values=given["pixel_values"].to(first.device, first.dtype)).logits.float()
        yield logits, given["labels"]
        if progress is not None:
            progress.advance()


PART = Images()
