"""Boxes out of what cells tell, and how well they find the objects: average precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nybble.models.own.detector import overlap

LEAST = 0.05
"""A box that is less likely isn't counted as found."""
SAME = 0.5
"""Two boxes that overlap by more (intersection over union) are of one object."""


def found_in(logits: Tensor, boxes: Tensor) -> Tensor:
    """Objects of an image, the likeliest first, without others of their class over the same place.

    Args:
        logits: [cells, classes + 1].
        boxes: [cells, 4].

    Returns:
        float32 [objects, 6]: class, likelihood, box.
    """
    likely, classes = logits.float().softmax(-1)[:, :-1].max(-1)
    order = likely.argsort(descending=True, stable=True)
    order = order[likely[order] >= LEAST]
    kept: list[int] = []
    for cell in order.tolist():
        alike = [other for other in kept if classes[other] == classes[cell]]
        if not alike or overlap(boxes[cell], boxes[alike], hull=False).max() <= SAME:
            kept.append(cell)
    return torch.cat([classes[kept, None].float(), likely[kept, None], boxes[kept].float()], -1)


def average_precision(found: Sequence[Tensor], wanted: Sequence[Tensor], at: float = SAME) -> float:
    """Mean over classes of the area under precision by recall, as Pascal VOC has counted it since 2010.

    Args:
        found: of each image, [objects, 6] as :func:`found_in` gives them.
        wanted: of each image, [objects, 5]: class, box.
        at: the overlap from which on an object is found; each is found once.
    """
    classes = sorted({int(c) for each in wanted for c in each[:, 0].tolist()})
    return sum(_of_class(found, wanted, each, at) for each in classes) / max(1, len(classes))


def _of_class(found: Sequence[Tensor], wanted: Sequence[Tensor], kind: int, at: float) -> float:
    given = [each[each[:, 0] == kind, 1:] for each in wanted]
    said = [(float(row[1]), i, row[2:]) for i, each in enumerate(found) for row in each if int(row[0]) == kind]
    taken = [torch.zeros(len(each), dtype=torch.bool) for each in given]
    right = []
    for _, i, box in sorted(said, key=lambda item: -item[0]):
        shares = overlap(box, given[i], hull=False) if len(given[i]) else torch.zeros(1)
        best = int(shares.argmax())
        hit = len(given[i]) > 0 and float(shares[best]) >= at and not bool(taken[i][best])
        if hit:
            taken[i][best] = True
        right.append(hit)
    hits = torch.tensor(right, dtype=torch.float64).cumsum(0)
    precision = hits / torch.arange(1, len(right) + 1)
    recall = hits / max(1, sum(map(len, given)))
    highest = precision.flip(0).cummax(0).values.flip(0)  # of any recall that is as large
    return float((highest * torch.diff(recall, prepend=torch.zeros(1, dtype=torch.float64))).sum())
