"""The teacher's attention maps: mean squared difference of each layer's probabilities, summed over layers.

Of an encoder-decoder the encoder's, the decoder's and the cross attention count. TBT (ACL 2023) adds it to the losses
of logits and hidden states. Maps are what transformers returns: behind dropout, where a network trains with any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nybble.training.losses import Lesson, Loss
from nybble.training.losses._outputs import layers_of, mean_square, real_tokens

NAMES = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
REMEDY = (
    "Maps come from an attention implementation that makes them: call set_attn_implementation('eager') on the network, "
    "and it with output_attentions=True; or leave this loss out."
)


@dataclass(frozen=True, kw_only=True)
class Attention(Loss):
    """See the module.

    Attributes:
        layers: which of them, from 0, negative ones from the end; none: all.
        padding: whether what tokens of padding look at counts, as it does in the released code.
    """

    layers: tuple[int, ...] = ()
    padding: bool = False
    outputs: ClassVar[tuple[str, ...]] = ("output_attentions",)

    def __call__(self, lesson: Lesson) -> Tensor:  # noqa: D102
        found = []
        for name, (student, teacher) in layers_of(lesson, NAMES, "attention", self.layers, REMEDY):
            real = None if self.padding else _real(lesson, name, student)
            found.append(mean_square(student, teacher, real))
        return torch.stack(found).sum()


def _real(lesson: Lesson, name: str, maps: Tensor) -> Tensor:
    """Bool [samples, 1, queries, keys]: both are no padding."""
    keyed = "encoder_attentions" if name == "cross_attentions" else name
    queries, keys = (real_tokens(lesson, of, maps.shape[at], "attention") for of, at in ((name, 2), (keyed, 3)))
    return (queries[:, :, None] & keys[:, None, :])[:, None]


PART = Attention
