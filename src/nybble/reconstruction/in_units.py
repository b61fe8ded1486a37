"""A window learned in units: residual block by residual block, or layer by layer.

The walk knows blocks, of which a convolutional network is one: its stages differ in shape, and transforms and GPTQ want
all of it. Learned as one window it does badly: hundreds of thousands of roundings follow what ten logits lose. So the
engine gets smaller windows of it: modules that :mod:`nybble.calibration.units` finds, fed with what reaches them on
each path. A finished unit is settled, and the next ones are fed with what it gives then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nybble.calibration.block import BlockState
from nybble.calibration.spans import spans
from nybble.calibration.streams import Stream
from nybble.calibration.trace import HIDDEN, BlockCall, Tensors, UnitCall, WholeCall
from nybble.calibration.units import Unit, find_units
from nybble.calibration.window import Window
from nybble.models.adapter import Adapter
from nybble.nn.kinds import Target
from nybble.nn.swap import hold_dense
from nybble.reconstruction import Reconstruction
from nybble.reconstruction.engine import reconstruct
from nybble.reconstruction.twins import settle_twins


def learn(window: Window, options: Reconstruction) -> None:
    """Learn on a window as a whole, or on its units in turn, as the options say."""
    adapter = window.calibration.adapter
    if adapter is None or not in_units(adapter, options):
        reconstruct(window, options)
        return
    for index in range(len(window.blocks)):
        _InUnits(window.only(index, window.part), options).run()


def in_units(adapter: Adapter, options: Reconstruction) -> bool:
    """Whether a model's windows are learned in units. A transform ties layers of all of a block, so it is whole."""
    one_block = adapter.convolutional or bool(adapter.whole)
    return options.block is None and (options.unit == "layer" or (options.unit == "block" and one_block))


def units_of(window: Window, options: Reconstruction) -> list[Unit]:
    """The units of a window of one block, found by running it on what it is given; empty: it can't be cut."""
    state, (calls, given) = window.block, next(iter(window.inputs("float")))
    call, samples = calls[0], len(given[HIDDEN])
    if isinstance(call, WholeCall):
        call = replace(call, inputs={name: _few(tensor, samples) for name, tensor in call.inputs.items()})
    if isinstance(call, WholeCall) or not (call.args or call.kwargs):  # two samples show as much as a batch does
        given = {name: _few(tensor, samples) for name, tensor in given.items()}
    inputs = [*given.values(), *(call.inputs.values() if isinstance(call, WholeCall) else ())]
    layers = layers_of(state.targets, options)
    with state.on("float") as module:
        adapter = window.calibration.adapter
        classes = () if adapter is None else adapter.units
        return find_units(module, layers, lambda: call.run(module, given), inputs, options.unit, classes)


def _few(tensor: Tensor, samples: int) -> Tensor:
    return tensor[:2] if tensor.dim() and len(tensor) == samples else tensor


def layers_of(targets: Sequence[Target], options: Reconstruction) -> dict[str, str]:
    """What is learned of a block's targets, and their modules."""
    return {target.name: target.module for target in targets if options.learns(target)}


class _InUnits:
    """The units of one block.

    Args:
        window: of the block. options: of the engine.
    """

    def __init__(self, window: Window, options: Reconstruction) -> None:
        self.window, self.options, self.state = window, options, window.block
        self.paths = sorted({"float", options.feed})
        self.streams: dict[str, Stream] = {}
        self._made = 0

    def run(self) -> None:
        """Learn them in turn; of a block that can't be cut all at once."""
        units = units_of(self.window, self.options)
        if not units:
            reconstruct(self.window, self.options)
            return
        views = [self._view(unit) for unit in units]
        try:
            for span in spans(chains(units), self.options.window, self.options.overlap):
                self._enter(units[span.start : span.stop])
                reconstruct(self._narrowed(units[span.start], views[span.start : span.stop]), self.options)
                for view in views[span.start : span.leave]:
                    settle_twins(view)
                if span.leave < len(units) and units[span.leave].follows:
                    self._advance(span.leave - span.start, units[span.leave])
                else:
                    self._close()
        finally:
            self._close()

    def _view(self, unit: Unit) -> BlockState:
        targets = [target for target in self.state.targets if target.name in unit.layers]
        return self.state.narrowed(unit.name, targets)

    def _narrowed(self, first: Unit, views: Sequence[BlockState]) -> Window:
        def source(path: str, order: Sequence[int] | None) -> Iterator[tuple[Sequence[BlockCall], Tensors]]:
            stream = self.streams[path]
            begins = list(stream)
            for number in range(len(begins)) if order is None else order:
                yield stream.calls[begins[number]], stream.read(begins[number])

        return Window(views, self.window.calibration, source, f"{self.window.part}/{first.name}")

    # ------------------------------------------------------------------------------------------------ streams
    def _enter(self, units: Sequence[Unit]) -> None:
        """Let streams be in front of the first unit of a window, and call the others behind it."""
        for path in self.paths:
            if path not in self.streams:
                self.streams[path] = self._caught(units[0], path)
            stream = self.streams[path]
            for at, calls in stream.calls.items():
                mask = calls[0].mask
                stream.calls[at] = [calls[0], *(_call(unit, i, mask) for i, unit in enumerate(units[1:], 1))]

    def _caught(self, unit: Unit, path: str) -> Stream:
        """What a unit is called with on a path."""
        stream, at = self._stream(path), 0
        with self._dense(), torch.no_grad():
            for calls, given in self.window.inputs(path):
                with self.state.on(path) as module:
                    hidden, args, kwargs = _arguments(calls[0], module, given, unit.name)
                call = replace(_call(unit, 0, _fitting(calls[0].mask, hidden)), args=args, kwargs=kwargs)
                size = len(given[HIDDEN])
                stream.begin(at, [call], {HIDDEN: hidden}, size)
                at += size
        return stream

    def _advance(self, left: int, to: Unit) -> None:
        """Move the streams through so many units, up to one that follows."""
        for path in self.paths:
            before, after = self.streams[path], self._stream(path)
            with self._dense(), self.state.on(path) as module, torch.no_grad():
                for at in before:
                    given: Tensors = before.read(at)
                    size, calls = len(given[HIDDEN]), before.calls[at]
                    for call in calls[:left]:
                        given = call.run(module, given)
                    after.begin(at, [_call(to, 0, _fitting(calls[0].mask, given[HIDDEN]))], given, size)
            before.close()
            self.streams[path] = after

    def _stream(self, path: str) -> Stream:
        """An empty one; of those that are kept in files each has files of its own."""
        calibration, self._made = self.window.calibration, self._made + 1
        spill = None if calibration.spill is None else calibration.spill.with_name(
            f"{calibration.spill.name}.{path}.{self._made}"
        )  # fmt: skip
        return Stream(calibration.samples, calibration.device, spill)

    @contextmanager
    def _dense(self) -> Iterator[None]:
        hold_dense(self.state.module, self.window.calibration.dtype)
        try:
            yield
        finally:
            hold_dense(self.state.module, None)

    def _close(self) -> None:
        for stream in self.streams.values():
            stream.close()
        self.streams = {}


def _call(unit: Unit, index: int, mask: Tensor | None) -> UnitCall:
    return UnitCall(
        index=index, args=(), kwargs={}, keyword=None, start=None, mask=mask, name=unit.name, writes=unit.writes
    )


def _fitting(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """A mask of tokens, where these are still what is behind the samples."""
    return mask if mask is not None and hidden.shape[: mask.dim()] == mask.shape else None


def chains(units: Sequence[Unit]) -> list[int]:
    """How many units follow each other before one is called with something else."""
    found: list[int] = []
    for unit in units:
        if unit.follows and found:
            found[-1] += 1
        else:
            found.append(1)
    return found


class _CaughtError(Exception):
    """Stops a block's forward at a unit."""


@torch.no_grad()
def _arguments(
    call: BlockCall, module: nn.Module, given: Tensors, name: str
) -> tuple[Tensor, tuple[Any, ...], Mapping[str, Any]]:
    """What a unit is called with where its block is called so: its input, and all else."""
    found: list[tuple[Tensor, tuple[Any, ...], Mapping[str, Any]]] = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[0].detach(), args[1:], kwargs))
        raise _CaughtError

    handle = module.get_submodule(name).register_forward_pre_hook(catch, with_kwargs=True)
    try:
        call.run(module, given)
    except _CaughtError:
        pass
    finally:
        handle.remove()
    return found[0]
