"""Neighbouring blocks and the inputs that calibration gives them: what every step works on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nybble.calibration.block import BlockState
from nybble.calibration.streams import Stream
from nybble.calibration.trace import BlockCall, Tensors
from nybble.core import ranks
from nybble.core.seeds import derive_seed
from nybble.models.adapter import Adapter

Batches = Callable[[], Iterable[tuple[BlockCall, Tensors]]]
"""The inputs of one block, batch by batch, as often as called."""
Known = dict[tuple[str, str], object]
"""Of one block: what was gathered, by a group's leader and what it is."""


@dataclass(kw_only=True)
class Calibration:
    """What every window of a run knows.

    Attributes:
        tokens: how many real tokens the samples have. samples, batches: how many there are.
        device, dtype: of forwards. seed: of every random choice. config: the model's.
        fisher: squared gradients of outputs by a layer's full name, where a step asked for them.
        paths: the streams that are run; of both, a layer's inputs can be compared.
        batch: samples of each batch but the last; 0: as evenly as they go.
        adapter: the model's; None where nobody asks what may be rescaled together.
        gradients: squared gradients of what blocks give by a block's full name, where a step asked for them.
        guides: squared gradients of what layers give, means over groups of channels, by a layer's full name, where a
            solver asked for them: [tokens, groups].
        times: seconds of every learning on a window, by its name, in order.
        spill: leading part of the names of files for what a step keeps of all samples; None keeps it in memory.
    """

    tokens: int
    samples: int
    batches: int
    device: torch.device
    dtype: torch.dtype
    seed: int
    config: object
    fisher: dict[str, Tensor] = field(default_factory=dict)
    paths: frozenset[str] = frozenset()
    gradients: dict[str, Stream] = field(default_factory=dict)
    guides: dict[str, Tensor] = field(default_factory=dict)
    adapter: Adapter | None = None
    times: dict[str, list[float]] = field(default_factory=dict)
    spill: Path | None = None
    batch: int = 0

    def first(self, number: int) -> int:
        """The first sample of a batch."""
        return number * (self.batch or -(-self.samples // self.batches))


Source = Callable[[str, Sequence[int] | None], Iterable[tuple[Sequence[BlockCall], Tensors]]]
"""path, batches by number (None: all) -> how a window's blocks are called, and what goes into the first."""


class Window:
    """Some neighbouring blocks.

    Args:
        blocks: in order.
        calibration: of the run.
        source: the inputs of the first block; None where nothing is calibrated.
        part: names the window in derived seeds.
        known: what was gathered of its block, where several recipes share it.
    """

    def __init__(
        self,
        blocks: Sequence[BlockState],
        calibration: Calibration,
        source: Source | None,
        part: str,
        known: Known | None = None,
    ) -> None:
        self.blocks, self.calibration, self.part, self.known = blocks, calibration, part, known
        self._source = source

    @property
    def calibrated(self) -> bool:
        """Whether there are inputs to look at."""
        return self._source is not None

    @property
    def block(self) -> BlockState:
        """The block of a window of one."""
        (found,) = self.blocks
        return found

    @property
    def last(self) -> str:
        """Full name of the module whose output is the window's."""
        state = self.blocks[-1]
        return f"{state.prefix}{state.within}" if state.within else state.name

    def batches(self, path: str, block: int = 0) -> Batches:
        """The inputs of one of the window's blocks on a path, run through the blocks before it.

        Args:
            path: ``float`` or ``quantized``.
            block: which.
        """

        def run() -> Iterator[tuple[BlockCall, Tensors]]:
            for calls, given in self.inputs(path, block):
                yield calls[0], given

        return run

    def own(self, path: str) -> Batches:
        """As :meth:`batches` of the first block, those of this process's share alone.

        Whatever each draws of torch's random state doesn't depend on the share, and what is drawn later neither.
        """

        def run() -> Iterator[tuple[BlockCall, Tensors]]:
            for _, calls, given in self.own_inputs(path):
                yield calls[0], given

        return run

    def own_inputs(self, path: str) -> Iterator[tuple[int, Sequence[BlockCall], Tensors]]:
        """Of this process's share of the batches: the number, and as :meth:`inputs`."""
        base, order = int(torch.randint(1 << 62, ())), ranks.share(self.calibration.batches)
        found = iter(self.inputs(path, order=None if ranks.size() == 1 else order))
        for number in order:
            torch.manual_seed(derive_seed(base, str(number)))
            calls, given = next(found)
            yield number, calls, given
        torch.manual_seed(derive_seed(base, "after"))

    @property
    def before(self) -> float:
        """The share of all samples that processes before this one have."""
        calibration = self.calibration
        return calibration.first(ranks.share(calibration.batches).start) / calibration.samples

    def run(self, calls: Sequence[BlockCall], given: Tensors, path: str) -> Tensors:
        """What the last block gives for one batch of the first one's inputs."""
        for call, state in zip(calls, self.blocks, strict=False):
            with state.on(path) as module:
                given = call.run(module, given)
        return given

    def inputs(
        self, path: str, block: int = 0, order: Sequence[int] | None = None
    ) -> Iterator[tuple[Sequence[BlockCall], Tensors]]:
        """For every batch (or those of ``order``, by number) the calls from a block on, and what goes into it."""
        assert self._source is not None
        for calls, given in self._source(path, order):
            for call, state in zip(calls, self.blocks[:block], strict=False):
                with state.on(path) as module:
                    given = call.run(module, given)
            yield calls[block:], given

    def only(self, block: int, part: str, known: Known | None = None) -> Window:
        """A window of one of its blocks."""

        def source(path: str, order: Sequence[int] | None) -> Iterator[tuple[Sequence[BlockCall], Tensors]]:
            return self.inputs(path, block, order)

        return Window(
            self.blocks[block : block + 1], self.calibration, source if self.calibrated else None, part, known
        )

    def seed(self, phase: str) -> None:
        """Fix torch's random state for what comes: stochastic roundings draw from it, and a resumed run the same."""
        torch.manual_seed(derive_seed(self.calibration.seed, self.part, phase))
