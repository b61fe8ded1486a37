"""The forwards of an update, shared between processes: they come to the bytes of one process.

Forward i is computed by rank i modulo their number. Gradients are not averaged by an all-reduce, whose sums have
another order for every number of ranks: each rank gets those of all forwards and adds them up in the order of the
forwards, which is what one process does. It costs as many gradients on their way as an update has forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nybble.core import ranks
from nybble.core.errors import UsageError

Given = tuple[Tensor, list[Tensor | None]]


def check_shares(accumulate: int, batch: int) -> None:
    """Refuse updates of fewer forwards than there are ranks.

    Raises:
        UsageError: says how many they must be.
    """
    if ranks.size() > accumulate:
        raise UsageError(
            f"accumulate is {accumulate}, and {ranks.size()} processes share the forwards of an update; give accumulate"
            f" {ranks.size()} or more, and a smaller batch (it is {batch}) for updates of as many examples."
        )


def check_alone(model: nn.Module) -> None:
    """Refuse to share the forwards of a network that one forward changes for the next.

    Raises:
        UsageError: names the layer.
    """
    for name, module in model.named_modules():
        if ranks.size() > 1 and getattr(module, "track_running_stats", False):
            raise UsageError(
                f"{name} ({type(module).__name__}) keeps averages of each batch in turn, and {ranks.size()} processes "
                "would each keep other ones; train such networks in one process."
            )


def in_turn(own: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """What each rank kept of its forwards of an update, as one process would have kept it.

    Args:
        own: float32, one a forward; none of a rank that had none to compute.
        device: of them.
    """
    if ranks.size() == 1:
        return list(own)
    every = ranks.gather([t.tolist() for t in own])
    kept = [every[i % len(every)][i // len(every)] for i in range(sum(map(len, every)))]
    return [torch.tensor(values, device=device) for values in kept]


class SharedForwards:
    """Of a training loop that calls :meth:`step` for each forward, on every rank.

    Args:
        parameters: those that want gradients; they have none before an update.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters, self.done = list(parameters), 0
        self.own: dict[int, Given] = {}
        self.loss: Tensor | None = None
        self.sums: list[Tensor | None] = [None] * len(self.parameters)

    def step(self, forward: Callable[[], Tensor], last: bool) -> Tensor:
        """One forward and backward, here or elsewhere.

        Args:
            forward: adds to the gradients; gives the loss, without one.
            last: of the update: parameters have the sum of all gradients then.

        Returns:
            the sum of the update's losses where it is the last; zero otherwise.
        """
        if self.done % ranks.size() == ranks.number():
            loss = forward()
            self.own = {self.done: (loss, [p.grad for p in self.parameters])}
            for p in self.parameters:
                p.grad = None
        self.done += 1
        device = self.parameters[0].device
        if last or self.done % ranks.size() == 0:
            for _, given in ranks.spread(self.own, device):
                self._add(*given)
            self.own = {}
        if not last:
            return torch.zeros((), device=device)
        assert self.loss is not None
        found = self.loss
        for p, total in zip(self.parameters, self.sums, strict=True):
            p.grad = total
        self.done, self.loss, self.sums = 0, None, [None] * len(self.parameters)
        return found

    def _add(self, loss: Tensor, gradients: list[Tensor | None]) -> None:
        self.loss = loss if self.loss is None else self.loss + loss
        for i, gradient in enumerate(gradients):
            before = self.sums[i]
            self.sums[i] = gradient if before is None else before if gradient is None else before.add_(gradient)
