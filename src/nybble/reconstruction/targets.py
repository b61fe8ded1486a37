"""What a window should give: the float blocks' outputs for every batch, in memory or, like hidden states, in files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from nybble.calibration.streams import Stream
from nybble.calibration.trace import HIDDEN, BlockCall
from nybble.calibration.window import Window
from nybble.core import ranks
from nybble.reconstruction import FISHER, FLOAT, LOCAL

_PATHS = {FLOAT: "float", LOCAL: "quantized"}
"""Of each target, the path whose inputs the float blocks get."""


class Wanted:
    """Targets by batch.

    Args:
        stream: of the targets.
        names: which there are.
        gradients: squared, where ``fisher`` is among them.
    """

    def __init__(self, stream: Stream, names: Sequence[str], gradients: Stream | None = None) -> None:
        self._stream, self._names, self._starts = stream, names, sorted(stream)
        self._gradients = gradients

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Of one batch, by name."""
        start = self._starts[number]
        found = self._stream.read(start)
        if self._gradients is not None:
            found[FISHER] = self._gradients.read(start)[HIDDEN]
        return {name: found[HIDDEN if name == FLOAT else name] for name in self._names}

    def __len__(self) -> int:
        return len(self._starts)


@contextmanager
def wanted_of(window: Window, names: Sequence[str]) -> Iterator[Wanted]:
    """The targets of these names, over all batches; files that hold them go with the context.

    ``float`` and ``local`` are passes of the float blocks: over what the float network gives them, or over what the
    quantized blocks before them give. The gradients of ``fisher``, by what the last block or unit gives, were
    gathered before the walk.
    """
    calibration = window.calibration
    stream = Stream(calibration.samples, calibration.device, calibration.spill)
    try:
        for name in (name for name in names if name in _PATHS):
            _fill(stream, window, name)
        yield Wanted(stream, names, calibration.gradients[window.last] if FISHER in names else None)
    finally:
        stream.close()


def _fill(stream: Stream, window: Window, name: str) -> None:
    """Put the outputs of all batches into the stream, as :class:`Wanted` reads it; each process makes its share."""
    first, sizes = window.calibration.first, dict[int, int]()

    def put(number: int, output: Tensor, size: int) -> None:
        if name == FLOAT:
            stream.begin(first(number), (), {HIDDEN: output}, size)
        else:
            stream.write(first(number), {name: output})

    for number, calls, given in window.own_inputs(_PATHS[name]):
        sizes[number] = len(given[HIDDEN])
        put(number, output_of(window, calls, given, "float"), sizes[number])
    key = HIDDEN if name == FLOAT else name
    made = ranks.others(
        window.calibration.batches, lambda n: (sizes[n], stream.read(first(n))[key]), window.calibration.device
    )
    for number, (size, output) in made:
        put(number, output, size)


def output_of(window: Window, calls: Sequence[BlockCall], given: Mapping[str, Tensor], path: str) -> Tensor:
    """What comes out of the window."""
    return window.run(calls, given, path)[HIDDEN]
