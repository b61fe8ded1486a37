"""What stands in the place of an operation while several are tried: one at a time, or a weighted sum of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nybble.core.shapes import Float


class Choices(nn.Module):
    """Several operations of one shape.

    Args:
        made: by name.

    Attributes:
        weights: None: the operation ``chosen`` alone runs. A tensor [operations]: the sum of all that have a place in
            ``live``, times their weights; its gradient is <dL/dy, o_k(x)>.
        live: numbers of operations that run where there are weights; None: all.
    """

    def __init__(self, made: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names = list(made)
        self.operations = nn.ModuleList(made.values())
        self.chosen = 0
        self.weights: Tensor | None = None
        self.live: Sequence[int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """As any of the operations."""
        if self.weights is None:
            found: Tensor = self.operations[self.chosen](x)
            return found
        live = range(len(self.operations)) if self.live is None else self.live
        parts = [self.weights[k].to(x.dtype) * self.operations[k](x) for k in live]
        return torch.stack(parts).sum(0)

    @property
    def alone(self) -> nn.Module:
        """The chosen operation."""
        return self.operations[self.chosen]


def choices_of(model: nn.Module) -> list[Choices]:
    """All of a network, in its order."""
    return [module for module in model.modules() if isinstance(module, Choices)]


def choose(model: nn.Module, encoding: Sequence[int]) -> None:
    """Let one operation of each run."""
    for module, number in zip(choices_of(model), encoding, strict=True):
        module.chosen, module.weights, module.live = number, None, None


class Alphas(nn.Module):
    """Logits of operations, moved by an Adam of their own; all its state lies in buffers, so checkpoints have it.

    Args:
        counts: operations of each place.
        lr, betas, decay: of Adam; ``decay`` is added to the gradient, as torch.optim.Adam does.
    """

    values: Tensor

    def __init__(self, counts: Sequence[int], *, lr: float, betas: tuple[float, float], decay: float) -> None:
        super().__init__()
        self.counts, self.lr, self.betas, self.decay = list(counts), lr, betas, decay
        width = max(counts)
        there = torch.arange(width) < torch.tensor(self.counts)[:, None]
        self.register_buffer("values", torch.zeros(len(self.counts), width).masked_fill(~there, float("-inf")))
        for name in ("first", "second", "steps"):
            self.register_buffer(name, torch.zeros(len(self.counts), width))

    def chances(self) -> Float[Tensor, "places width"]:
        """Softmax of each place; 0 where it has fewer operations."""
        return self.values.softmax(-1)

    @torch.no_grad()
    def step(self, gradient: Float[Tensor, "places width"], moves: Tensor | None = None) -> None:
        """One step of Adam.

        Args:
            gradient: of the loss, by ``values``.
            moves: bool of the same shape, which of them move (and count a step); None: all.
        """
        there = self.values.isfinite()
        moves = there if moves is None else moves & there
        g = torch.where(moves, gradient + self.decay * torch.where(there, self.values, 0), 0)
        (b1, b2), one = self.betas, moves.to(g.dtype)
        first, second, steps = (self.get_buffer(name) for name in ("first", "second", "steps"))
        steps += one
        first.copy_(torch.where(moves, b1 * first + (1 - b1) * g, first))
        second.copy_(torch.where(moves, b2 * second + (1 - b2) * g * g, second))
        count = steps.clamp_min(1)
        step = self.lr * (first / (1 - b1**count)) / ((second / (1 - b2**count)).sqrt() + 1e-8)
        self.values.copy_(torch.where(moves, self.values - step, self.values))
