"""A classifier whose every tensor between its rounded input and its logits is integer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nybble.core.errors import DataError
from nybble.nn.integer.entrance import Grid


@dataclass(frozen=True)
class Node:
    """One step: the module that does it, what it reads (numbers of nodes, 0 is the rounded input), its name."""

    module: nn.Module
    inputs: tuple[int, ...]
    name: str


class IntegerNetwork(nn.Module):
    """Made of a quantized model by :func:`nybble.nn.integer.convert.integer_network`.

    Args:
        entrance: what rounds the input. nodes: in order; the last gives the sums that are the logits.
        scale: of the logits, float64, [classes].
        shape: of an input, without the batch.
    """

    def __init__(self, entrance: Grid, nodes: Sequence[Node], scale: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.entrance, self.shape = entrance, shape
        self.steps = nn.ModuleList(node.module for node in nodes)
        self.reads, self.names = [node.inputs for node in nodes], [node.name for node in nodes]
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """Floats [n, channels, height, width] -> logits [n, classes], float32.

        Raises:
            DataError: values that aren't finite.
        """
        if not bool(torch.isfinite(x).all()):
            raise DataError("the input has NaN or infinite values, which no integer stands for.")
        return (self.run(self.entrance.codes(x)) * self.get_buffer("scale")).float()

    def run(self, q: Tensor) -> Tensor:
        """Integer codes of the input (:meth:`Grid.codes`) -> the logits' codes, int32 [n, classes]."""
        return self._last(q)

    def simulate(self, q: Tensor) -> Tensor:
        """The same codes held in float64, calculated in floats alone, as an emulation does: float64 [n, classes]."""
        return self._last(q.double())

    def _last(self, q: Tensor) -> Tensor:
        for _, y in self.codes(q):  # noqa: B007
            pass
        return y

    def codes(self, q: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Every step's name and what it gives, in order; what nobody reads any more is let go.

        Args:
            q: as of :meth:`run`, or of :meth:`simulate` in float64.
        """
        last = {read: at for at, reads in enumerate(self.reads) for read in reads}
        known = {0: q}
        for at, (step, reads) in enumerate(zip(self.steps, self.reads, strict=True)):
            y = step(*(known[i] for i in reads))
            for i in set(reads):
                if last[i] == at:
                    del known[i]
            known[at + 1] = y
            yield self.names[at], y
