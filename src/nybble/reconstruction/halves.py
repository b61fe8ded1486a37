"""A step in two halves: each has half of a batch's samples, by one process after the other or by two at once.

Half by half a gradient is two terms, and a sum of two is the same in any order: so a run comes to the same codes
whether one process takes both, or each of two takes one (:mod:`nybble.core.ranks`). Weights are rounded once a step, as
leaves that both halves multiply with; what came to these goes back through the rounding, and its parts are moved, by
one process for each layer, its owner. More than two processes share the rounding alone.

Halved are batches that are large (:data:`LEAST`): two halves of a small one would leave a GPU idle. There every process
does all. So do windows where a half can't be told from the whole, or where something is learned on the samples' own
path (inputs, norms, biases, transforms), or where gradients are shortened together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from nybble.calibration.arguments import mapped_calls
from nybble.calibration.trace import HIDDEN, BlockCall
from nybble.calibration.window import Window
from nybble.core import ranks
from nybble.nn.fake import FakeLayer
from nybble.nn.twin import FakeWeight
from nybble.reconstruction import Reconstruction
from nybble.reconstruction.targets import output_of
from nybble.rounding import get_rounding

LEAST = 1 << 24
"""Elements of what a batch should come to, from which on steps are in halves; 8 x 2048 tokens x 4096 are four times."""
_ALIKE = 0.02
"""By how much, relative to its size, an output may differ in halves: products of other sizes round otherwise."""

Batch = tuple[Sequence[BlockCall], Mapping[str, Tensor], Mapping[str, Tensor]]
"""How the window's blocks are called, what goes into the first, and what should come out."""


class Halves:
    """Leaves the gradient of a batch's loss in the parameters of the layers that this process owns.

    Args:
        window: with its twins in place.
        options: of the engine.
        dtypes: of every twin that learns or multiplies, what its weight is asked for in.
    """

    def __init__(self, window: Window, options: Reconstruction, dtypes: Mapping[FakeWeight, torch.dtype]) -> None:
        self.window, self.options, self.dtypes = window, options, dtypes
        self.owners = owners_of(list(dtypes))

    def owns(self, weight: FakeWeight) -> bool:
        """Whether this process moves it."""
        return self.owners[weight] == ranks.number()

    def sync(self) -> None:
        """Give every process what the owners have learned."""
        for weight, owner in self.owners.items():
            for parameter in weight.parameters():
                if parameter.requires_grad:
                    ranks.from_rank(parameter.data, owner)

    def run(self, batch: Batch, products: Callable[[], AbstractContextManager[object]]) -> Tensor:
        """One batch, forward and backward; returns its error (of this process's halves).

        Args:
            batch: whole.
            products: the precision of forwards.
        """
        dense = self._dense()
        leaves = {w: made.detach().requires_grad_(_learns(w)) for w, made in dense.items()}
        parts = halves_of(batch)
        place = ranks.number() % len(parts)
        total: Tensor | None = None
        for weight in leaves:
            weight.instead = lambda asked, _: leaves[asked]
        try:
            for (calls, given, wanted), share in parts if ranks.size() == 1 else parts[place : place + 1]:
                with products():
                    output = output_of(self.window, calls, given, "quantized")
                error = self.options.loss(output, wanted, calls[0].mask) * share
                error.backward()  # type: ignore[no-untyped-call]
                total = error.detach() if total is None else total + error.detach()
        finally:
            for weight in leaves:
                weight.instead = None
        counts = ranks.number() < len(parts)  # a third process did what another does
        gradients = {}
        for weight, leaf in leaves.items():
            if _learns(weight):
                own = leaf.grad if leaf.grad is not None and counts else torch.zeros_like(leaf)
                gradient = ranks.summed(own, self.owners[weight])
                if self.owns(weight):
                    gradients[weight] = gradient
                del own, gradient
                leaf.grad = None
        for weight, gradient in gradients.items():  # all sums are there: no process waits for another's roundings
            dense[weight].backward(gradient)  # type: ignore[no-untyped-call]
        assert total is not None
        return total if counts else torch.zeros_like(total)

    def _dense(self) -> dict[FakeWeight, Tensor]:
        """Every weight as its owner rounds it; there with what its gradient needs.

        All roundings come before anything is told: told one by one, each would wait for those of the other processes.
        """
        made = {
            weight: weight.dense(dtype)
            if self.owns(weight)
            else torch.empty(weight.shape, dtype=dtype, device=weight.latent.device)
            for weight, dtype in self.dtypes.items()
        }
        for weight, tensor in made.items():
            ranks.from_rank(tensor.detach(), self.owners[weight])
        return made


def halves_for(
    window: Window, options: Reconstruction, twins: Sequence[FakeLayer], parameters: Sequence[nn.Parameter]
) -> Halves | None:
    """None where a window's steps are not done in halves; see the module.

    Args:
        window: with its twins in place.
        options: of the engine.
        twins: all that the window has.
        parameters: what is learned.
    """
    own = {id(parameter) for twin in twins for parameter in twin.weight.parameters()}
    beside = any(id(parameter) not in own for parameter in parameters) or options.max_norm is not None
    if beside or any(state.lends is not None for state in window.blocks) or any(map(_draws, twins)):
        return None
    calls, given = next(iter(window.inputs(options.feed, order=[0])))
    if len(given[HIDDEN]) < 2:
        return None
    dtypes: dict[FakeWeight, torch.dtype] = {}

    def noting(weight: FakeWeight, dtype: torch.dtype) -> Tensor:
        dtypes[weight] = dtype
        return weight.dense(dtype)

    try:
        for twin in twins:
            twin.weight.instead = noting
        with torch.no_grad():
            whole = output_of(window, calls, given, "quantized")
            parts = [output_of(window, *half[:2], "quantized") for half, _ in halves_of((calls, given, {}))]
            apart = (torch.cat(parts).float() - whole.float()).norm() / whole.float().norm()
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError):  # whatever a block raises of half a mask
        return None
    finally:
        for twin in twins:
            twin.weight.instead = None
    if not bool(apart < _ALIKE) or any(twin.weight not in dtypes for twin in twins):
        return None
    return Halves(window, options, dtypes)


def halves_of(batch: Batch) -> list[tuple[Batch, float | Tensor]]:
    """Both halves of a batch, each with its share of the real tokens; one of a single sample."""
    calls, given, wanted = batch
    count, mask = len(given[HIDDEN]), calls[0].mask
    found: list[tuple[Batch, float | Tensor]] = []
    for start, stop in ((0, count // 2), (count // 2, count)):
        if start == stop:
            continue

        def cut(tensor: Tensor, start: int = start, stop: int = stop) -> Tensor:
            return tensor[start:stop] if tensor.dim() and len(tensor) == count else tensor

        share = (stop - start) / count if mask is None else mask[start:stop].sum() / mask.sum()
        tensors = [{name: cut(tensor) for name, tensor in each.items()} for each in (given, wanted)]
        found.append(((mapped_calls(calls, cut), tensors[0], tensors[1]), share))
    return found


def owners_of(weights: Sequence[FakeWeight]) -> dict[FakeWeight, int]:
    """Which process rounds and moves each: the largest first, each by whoever has least."""
    ordered = sorted(weights, key=lambda w: -w.shape.numel())
    return dict(zip(ordered, ranks.owners([w.shape.numel() for w in ordered]), strict=True))


def _learns(weight: FakeWeight) -> bool:
    return any(parameter.requires_grad for parameter in weight.parameters())


def _draws(twin: FakeLayer) -> bool:
    """Whether a layer's roundings are drawn: halves would draw otherwise."""
    return any(get_rounding(part.quantizer.rounding).stochastic for _, part in twin.learned())
