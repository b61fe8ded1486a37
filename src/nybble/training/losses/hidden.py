"""The teacher's hidden states: mean squared difference of each layer's, summed over layers.

The embeddings' output is layer 0. Of an encoder-decoder both sides count. BiT (NeurIPS 2022) and TBT (ACL 2023) add it
to the loss of logits; TBT's released code counts the encoder's last state twice, this doesn't.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nybble.training.losses import Lesson, Loss
from nybble.training.losses._outputs import layers_of, mean_square, real_tokens

NAMES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
REMEDY = "Call it with output_hidden_states=True, or leave this loss out."


@dataclass(frozen=True, kw_only=True)
class Hidden(Loss):
    """See the module.

    Attributes:
        layers: which of them, 0 the embeddings' output, negative ones from the end; none: all.
        padding: whether tokens of padding count, as they do in the released code of both.
    """

    layers: tuple[int, ...] = ()
    padding: bool = False
    outputs: ClassVar[tuple[str, ...]] = ("output_hidden_states",)

    def __call__(self, lesson: Lesson) -> Tensor:  # noqa: D102
        found = []
        for name, (student, teacher) in layers_of(lesson, NAMES, "hidden", self.layers, REMEDY):
            real = None if self.padding else real_tokens(lesson, name, student.shape[1], "hidden")
            real = None if real is None else real.view(*real.shape, *[1] * (student.dim() - 2))
            found.append(mean_square(student, teacher, real))
        return torch.stack(found).sum()


PART = Hidden
