"""The gradient of one step: forward, loss, backward. On a GPU it is recorded once a window, and replayed.

A step launches hundreds of small kernels (each weight is rounded anew), so that a GPU waits for the processor most of
the time; a CUDA graph launches them all at once. The kernels are the same, and so are the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from nybble.calibration.trace import BlockCall
from nybble.calibration.window import Window
from nybble.core import ranks
from nybble.learned import Learned
from nybble.nn.fake import FakeLayer
from nybble.reconstruction import Reconstruction
from nybble.reconstruction.halves import Batch, Halves
from nybble.reconstruction.optimizing import Mover
from nybble.reconstruction.targets import output_of

WARM, FEWEST = 2, 10
"""Steps that run as they are before one is recorded, and the fewest for which that pays."""


class Gradients:
    """Leaves the gradient of a batch's loss in the parameters.

    Args:
        window: with its twins in place. options: of the engine. twins: all that the window has. mover: of their parts.
        scale: the window's loss at the start.
        precision: of products; None: as the model.
        halves: where steps are done in halves.
    """

    def __init__(
        self,
        window: Window,
        options: Reconstruction,
        twins: Sequence[FakeLayer],
        mover: Mover,
        scale: float,
        precision: torch.dtype | None,
        halves: Halves | None = None,
    ) -> None:
        self.window, self.options, self.twins, self.mover = window, options, twins, mover
        self.scale, self.precision = scale, precision
        self._penalized = any(type(part).penalty is not Learned.penalty for t in twins for _, part in t.learned())
        cuda = window.calibration.device.type == "cuda"
        self._progress = torch.zeros((), device=window.calibration.device) if cuda else None
        self._warm = WARM if cuda and options.steps >= FEWEST else -1
        self._recorded: _Recorded | None = None
        self._halves = halves
        if ranks.size() > 1:  # what goes between processes is not recorded
            self._warm = -1

    def sync(self) -> None:
        """Let every process have what was learned, wherever that was: elsewhere than in halves, as the first has it."""
        if self._halves is not None:
            self._halves.sync()
        else:
            for parameter in self.mover.parameters:
                ranks.from_rank(parameter.data, 0)

    def of(
        self, calls: Sequence[BlockCall], given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], step: int
    ) -> tuple[float, float]:
        """Of one batch: its error, and the loss whose gradient is left: the error with penalties."""
        if self._progress is not None:
            self._progress.fill_(step / self.options.steps)
        if self._recorded is not None and self._recorded.fits(calls, given, wanted):
            error, loss = self._recorded.replay(given, wanted)
        elif self._warm == 0 and self._recorded is None:
            self._warm, self._recorded = -1, self._record(calls, given, wanted)
            return self.of(calls, given, wanted, step)
        elif self._warm > 0:
            self._warm -= 1
            with _aside():
                error, loss = self._run(calls, given, wanted, step)
        else:
            error, loss = self._run(calls, given, wanted, step)
        return self._told(float(error), float(loss))

    def _told(self, error: float, loss: float) -> tuple[float, float]:
        """The same numbers to all processes: sums of those that each has of its own, or the first one's."""
        if ranks.size() == 1:
            return error, loss
        found = ranks.gather((error, loss))
        if self._halves is None:
            return found[0]
        total = torch.tensor(sum(error for error, _ in found), dtype=torch.float32)  # as if added in one process
        return float(total), sum(loss for _, loss in found)

    def _run(
        self, calls: Sequence[BlockCall], given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, Tensor]:
        self.mover.clear()
        if self._halves is not None:
            return self._run_halves(self._halves, (calls, given, wanted), step)
        with _products(self.window, self.precision):
            output = output_of(self.window, calls, given, "quantized")
        error = self.options.loss(output, wanted, calls[0].mask)
        loss = error
        if self._penalized:
            t = step / self.options.steps if self._progress is None else self._progress
            loss = error + self.options.penalty * self.scale * self._penalty(self.twins, t)
        loss.backward()  # type: ignore[no-untyped-call]
        self.mover.shape()
        return error.detach(), loss.detach()

    def _run_halves(self, halves: Halves, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """As :meth:`_run`; the penalty of each layer's parts is its owner's."""
        error = halves.run(batch, lambda: _products(self.window, self.precision))
        loss, own = error, [twin for twin in self.twins if halves.owns(twin.weight)]
        if self._penalized and own:
            t = step / self.options.steps if self._progress is None else self._progress
            penalty = self.options.penalty * self.scale * self._penalty(own, t)
            if penalty.requires_grad:  # not before a part's penalty begins
                penalty.backward()  # type: ignore[no-untyped-call]
            loss = error + penalty.detach()
        self.mover.shape()
        return error, loss

    def _penalty(self, twins: Sequence[FakeLayer], t: float | Tensor) -> Tensor:
        """Of the parts of some layers, a mean over all elements that the penalties of all are sums over."""
        total = torch.stack([twin.penalty(t) for twin in twins]).sum()
        return total / sum(twin.weight.shape.numel() for twin in self.twins)

    def _record(
        self, calls: Sequence[BlockCall], given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
    ) -> _Recorded | None:
        """None where the window can't be recorded: experts are chosen on the processor, say."""
        made = _Recorded(calls, given, wanted, self.mover)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the recording has memory of its own
        try:
            with torch.cuda.graph(made.graph, capture_error_mode="thread_local"):
                made.result = self._run(calls, made.given, made.wanted, 0)
        except RuntimeError:
            self.mover.clear()
            torch.cuda.synchronize()
            return None
        made.gradients = [parameter.grad for parameter in self.mover.parameters]
        return made


class _Recorded:
    """A step's kernels, and the memory that they read and write."""

    def __init__(
        self, calls: Sequence[BlockCall], given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], mover: Mover
    ) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self.given = {name: tensor.clone() for name, tensor in given.items()}
        self.wanted = {name: tensor.clone() for name, tensor in wanted.items()}
        self.calls, self.mover = calls, mover
        self.gradients: list[Tensor | None] = []
        self.result: tuple[Tensor, Tensor] | None = None

    def fits(self, calls: Sequence[BlockCall], given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
        """Whether a batch is called as the recorded one was, with tensors of the same sizes."""
        return (
            _alike(self.given, given)
            and _alike(self.wanted, wanted)
            and all(same_call(one, other) for one, other in zip(self.calls, calls, strict=True))
        )

    def replay(self, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The step on another batch."""
        for held, now in ((self.given, given), (self.wanted, wanted)):
            for name, tensor in held.items():
                tensor.copy_(now[name])
        self.graph.replay()
        for parameter, gradient in zip(self.mover.parameters, self.gradients, strict=True):
            parameter.grad = gradient  # an unrecorded step puts others there
        assert self.result is not None
        return self.result


def _alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        (t.shape, t.dtype, t.device) == (other[name].shape, other[name].dtype, other[name].device)
        for name, t in one.items()
    )


def same_call(one: BlockCall, other: BlockCall) -> bool:
    """Whether two batches' calls of a block pass the same objects: tensors are compared by identity, not by value."""
    return (
        (one.index, one.keyword, one.flows) == (other.index, other.keyword, other.flows)
        and _same(one.mask, other.mask)
        and _same(one.args, other.args)
        and _same(dict(one.kwargs), dict(other.kwargs))
    )


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor) or type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    return isinstance(one, str | int | float | bool | torch.dtype | torch.device) and one == other


@contextmanager
def _aside() -> Iterator[None]:
    """On a stream beside the main one: what is recorded may not hang on work of that one's."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def _products(window: Window, precision: torch.dtype | None) -> AbstractContextManager[object]:
    if precision is None:
        return nullcontext()
    # no cache: twins make their weights anew in every forward
    return torch.autocast(window.calibration.device.type, precision, cache_enabled=False)
