"""How images are moved about before a network in training sees them: mirrored, shifted; drawn anew for each forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.core.errors import UsageError
from nybble.core.options import build
from nybble.training.optimizers import read_options

FORM = "give 'flip', 'crop=PIXELS', or both: 'flip crop=4'"


@dataclass(frozen=True, kw_only=True)
class Moves:
    """``flip``: each image is mirrored or not. ``crop``: shifted by up to so many pixels, edges repeated."""

    flip: bool = False
    crop: int = 0

    def __call__(self, images: Tensor, drawn: torch.Generator) -> Tensor:
        """Moved images.

        Args:
            images: [images, channels, height, width].
            drawn: on the CPU, whose numbers are the same for every device.
        """
        count, _, height, width = images.shape
        flip = torch.randint(2, (count, 1), generator=drawn) if self.flip else torch.zeros(count, 1, dtype=torch.int64)
        down, across = torch.randint(-self.crop, self.crop + 1, (2, count, 1), generator=drawn)
        rows = (torch.arange(height) + down).clamp(0, height - 1)
        columns = (torch.arange(width) + across).clamp(0, width - 1)
        columns = torch.where(flip == 1, width - 1 - columns, columns)
        at = torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
        n, y, x = (place.to(images.device) for place in at)
        return images.permute(0, 2, 3, 1)[n, y, x].permute(0, 3, 1, 2).contiguous()


def parse_moves(line: str, size: tuple[int, int]) -> Moves | None:
    """Moves from a line (``flip crop=4``) for images of a height and width; None of an empty one.

    Raises:
        UsageError: another word, or a crop that leaves nothing of an image. SchemeError: another option, or value.
    """
    words = line.split()
    if not words:
        return None
    options = read_options(["flip=true" if word == "flip" else word for word in words], f"augment ({FORM})")
    made = build(Moves, options, f"augment ({FORM})")
    if not 0 <= made.crop < min(size):
        raise UsageError(
            f"augment: crop is {made.crop}, and images are {size[0]} x {size[1]}; give 0 to {min(size) - 1}."
        )
    return made
