"""What a whole network is taught with: samples, what it should say of them, and how far it is from that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.seeds import generator
from nybble.core.shapes import Bool, Float, Float32
from nybble.models.adapter import Adapter
from nybble.nn.kinds import Target

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """Samples and what is wanted of them.

    Attributes:
        samples: how many there are. batch: the inputs of those of these numbers, on the model's device, and which
            tokens are real (None: all).
        wanted: what the float network gives for the same inputs; None where the next token is what is wanted.
        seed: of everything that is drawn.
    """

    samples: int
    batch: Callable[[list[int]], tuple[Inputs, Tensor | None]]
    wanted: Callable[[Inputs], Tensor] | None
    seed: int

    def judged(
        self,
        output: Float[Tensor, " samples *rest"],
        inputs: Inputs,
        real: Bool[Tensor, "samples tokens"] | None,
        wanted: Tensor | None = None,
        divergence: bool = False,
    ) -> Float32[Tensor, ""]:
        """Of the next token, a mean over real ones; or of the float network's output, over its power.

        Args:
            output: of the network for these inputs.
            inputs: what it got.
            real: which of its tokens count; None: all.
            wanted: what the float network gives, where that is known already.
            divergence: by how much the network's distribution of the next token diverges from the float one's (KL,
                in nats, a mean over real tokens) instead of the difference of the two outputs.
        """
        output = output.float()
        if self.wanted is None:
            ids = inputs["input_ids"]
            lost = -output[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            counts = torch.ones_like(lost) if real is None else (real[:, 1:] & real[:, :-1]).float()
            return (lost * counts).sum() / counts.sum().clamp(min=1)
        wanted = (self.wanted(inputs) if wanted is None else wanted).float()
        if real is not None and real.shape == output.shape[:2]:
            output, wanted = output[real], wanted[real]
        if divergence:
            right, found = wanted.log_softmax(-1), output.log_softmax(-1)
            return (right.exp() * (right - found)).sum(-1).mean()
        return (output - wanted).square().sum() / wanted.square().sum().clamp(min=1e-20)

    def order(self, count: int, *names: str) -> list[int]:
        """Numbers of samples: all of them, shuffled by the seed and these names, again and again."""
        draws, found = generator(self.seed, *names), list[int]()
        while len(found) < count:
            found += torch.randperm(self.samples, generator=draws).tolist()
        return found[:count]


@dataclass(frozen=True, kw_only=True)
class Network(Lessons):
    """A whole float network and what it is taught with.

    Attributes:
        model: float32, in evaluation mode; its own to change.
        adapter: the model's.
        targets: what the scheme rounds, by the full names of blocks; of the empty name, what is in none.
        products: what products are best computed in on the model's device.
        speaks: whether its output is about the next token.
    """

    model: nn.Module
    adapter: Adapter
    targets: Mapping[str, Sequence[Target]]
    products: torch.dtype
    speaks: bool


def main_output(output: Any) -> Tensor:
    """The tensor that a network is about: logits, else the last hidden state, else the first tensor of it."""
    if isinstance(output, Tensor):
        return output
    named = [getattr(output, name, None) for name in ("logits", "last_hidden_state")]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return next(value for value in (*named, *values) if isinstance(value, Tensor))
