"""A small detector of objects: a residual network over a grid of cells, each of which tells one object or none.

As in YOLO (Redmon et al. 2016, arXiv:1506.02640) the cell that an object's centre lies in tells its class and box; of
two in one cell the smaller wins. Classes have a softmax with the background, so that logits can be distilled.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput


class DetectorConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Sizes, and weights in the loss.

    Attributes:
        image_size: pixels a side. num_channels: of an image.
        widths: channels of the stages, each of which halves the image.
        background: weight of cells without an object. boxes: weight of the loss of boxes.
    """

    model_type = "nybble-detector"

    def __init__(
        self,
        image_size: int = 64,
        num_channels: int = 1,
        widths: tuple[int, ...] = (16, 32, 64),
        background: float = 0.2,
        boxes: float = 2.0,
        **more: Any,
    ) -> None:
        self.image_size, self.num_channels, self.widths = image_size, num_channels, list(widths)
        self.background, self.boxes = background, boxes
        super().__init__(**more)


@dataclass
class Detections(ModelOutput):
    """Of every cell: ``logits`` [images, cells, classes + 1], the last of no object; ``boxes`` [images, cells, 4].

    A box is left, top, right, bottom in shares of the image. ``loss`` where labels are given.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    boxes: Tensor | None = None


class Stage(nn.Module):
    """Half the image, then a residual block."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(into, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """[n, in, h, w] -> [n, out, h / 2, w / 2]."""
        x = self.down(x)
        return functional.relu(x + self.block(x))


class Detector(PreTrainedModel):  # type: ignore[no-untyped-call]
    """See the module."""

    config_class = DetectorConfig
    main_input_name = "pixel_values"

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__(config)
        ends = [config.num_channels, *config.widths]
        stages = [Stage(into, out) for into, out in pairwise(ends)]
        last, self.classes = ends[-1], int(config.num_labels or 0)
        neck = nn.Sequential(nn.Conv2d(last, last, 3, padding=1, bias=False), nn.BatchNorm2d(last), nn.ReLU())
        self.net = nn.Sequential(*stages, neck, nn.Conv2d(last, self.classes + 1 + 4, 1))
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Weights begin as torch draws them: transformers' own, of one deviation for all layers, learn much slower."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Detections:
        """Detect, and compare with labels where they are given.

        Args:
            pixel_values: float [images, channels, height, width].
            labels: float [images, objects, 5]: class and box; class -1 is padding.
        """
        found = self.net(pixel_values)
        rows, columns = found.shape[2:]
        found = found.permute(0, 2, 3, 1).flatten(1, 2)
        logits, raw = found[..., :-4], found[..., -4:].float()
        boxes = _boxes(raw, rows, columns)
        loss = None if labels is None else self._loss(logits.float(), boxes, labels.float(), rows, columns)
        return Detections(loss=loss, logits=logits, boxes=boxes)

    def _loss(self, logits: Tensor, boxes: Tensor, labels: Tensor, rows: int, columns: int) -> Tensor:
        """Cross-entropy of all cells, and one less the overlap (GIoU) of boxes where there are objects."""
        none = self.classes
        classes, wanted = cells_of(labels, rows, columns, none)
        weights = torch.ones(none + 1, device=logits.device)
        weights[none] = float(self.config.background)
        told = functional.cross_entropy(logits.flatten(0, 1), classes.flatten(), weights)
        real = torch.ne(classes, none)
        apart = (1 - overlap(boxes[real], wanted[real])).sum() / real.sum().clamp_min(1)
        return told + float(self.config.boxes) * apart


def _boxes(raw: Tensor, rows: int, columns: int) -> Tensor:
    """Boxes of cells from what the network gives: the centre within its cell, and the size, about a cell at 0."""
    number = torch.arange(rows * columns, device=raw.device)
    corner = torch.stack([number % columns, number // columns], -1)
    grid = torch.tensor([columns, rows], device=raw.device)
    centre = (corner + raw[..., :2].sigmoid()) / grid
    half = raw[..., 2:].clamp(-6, 6).exp() / grid / 2
    return torch.cat([centre - half, centre + half], -1)


def cells_of(labels: Tensor, rows: int, columns: int, none: int) -> tuple[Tensor, Tensor]:
    """What cells are to tell: class int64 [images, cells], ``none`` without an object, and box [images, cells, 4]."""
    images = len(labels)
    classes = torch.full((images, rows * columns), none, dtype=torch.int64, device=labels.device)
    boxes = labels.new_zeros(images, rows * columns, 4)
    area = (labels[..., 3] - labels[..., 1]) * (labels[..., 4] - labels[..., 2])
    for at in area.argsort(-1, descending=True).unbind(-1):  # the smaller are written over the larger
        each = torch.arange(images, device=labels.device)
        chosen = labels[each, at]
        x = ((chosen[:, 1] + chosen[:, 3]) / 2 * columns).long().clamp(0, columns - 1)
        y = ((chosen[:, 2] + chosen[:, 4]) / 2 * rows).long().clamp(0, rows - 1)
        real = chosen[:, 0] >= 0
        each, cell, chosen = each[real], (y * columns + x)[real], chosen[real]
        classes[each, cell], boxes[each, cell] = chosen[:, 0].long(), chosen[:, 1:]
    return classes, boxes


def overlap(a: Tensor, b: Tensor, hull: bool = True) -> Tensor:
    """Intersection over union of boxes [..., 4]; with ``hull`` less what their hull has beside both (GIoU)."""
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0).prod(-1)
    both = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inner
    found = inner / both.clamp_min(1e-9)
    if not hull:
        return found
    outer = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    return found - (outer - both) / outer.clamp_min(1e-9)


PART = Detector
