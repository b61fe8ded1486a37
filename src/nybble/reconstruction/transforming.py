"""A learned transform at work in a block: what its layers and norms compute with while it is learned, and after.

On the quantized path the block's parameters are lent for every forward: the float32 truth, rewritten by the transform
as it is (:class:`~nybble.learned.transforms.Moving`), to trainable twins as what they round, to norms and layers in
float in their dtype. The truth itself changes once, when the block is done (:meth:`Transformed.settle`), by the same
functions of the same numbers: what was judged is what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from nybble.calibration.block import BlockState
from nybble.calibration.folds import extents_of, places_of
from nybble.calibration.window import Window
from nybble.learned.transforms import LearnedTransform, Moving, Place
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.fake import FakeLayer
from nybble.nn.kinds import Target
from nybble.nn.layer import QuantLayer
from nybble.nn.packed import Packed
from nybble.qtensor.block import BlockQTensor
from nybble.reconstruction import Reconstruction


class Transformed:
    """See the module; called, it gives what is lent.

    Args:
        state: the block. moving: its transform.
    """

    def __init__(self, state: BlockState, moving: Moving) -> None:
        self.state, self.moving = state, moving
        self._truth = {name: state.get(name) for place in moving.places for name in place.weights}

    def values(self) -> dict[str, Tensor]:
        """The float32 tensors that change, by the float block's names; with gradients."""
        with self.state.on("float"):
            return self.moving.rewritten(self._truth)

    def matrix(self, target: Target, values: Mapping[str, Tensor]) -> Tensor:
        """A target's matrix among these values, else the float one; float32."""
        module = self.state.float_module(target.module)
        return target.kind.matrix(module, target.leaf, lambda key: _of(self.state, values, f"{target.module}.{key}"))

    def __call__(self) -> dict[str, Tensor]:
        """By name in the module with its twins."""
        left, found = self.values(), dict[str, Tensor]()
        for target, twin in self._twins():
            if left.keys() & set(target.parameters):
                found[f"{target.name}.weight.latent"] = self.matrix(target, left)
            bias = left.pop(f"{target.name}.bias", None)
            if bias is not None and twin.bias is not None:
                found[f"{target.name}.bias"] = bias
            left = {name: value for name, value in left.items() if name not in target.parameters}
        for name, value in left.items():
            found[name] = value.to(_live(self.state, name).dtype)
        return found

    @torch.no_grad()
    def settle(self) -> None:
        """Fold what was learned into the block's truth, its twins and what is known of their inputs."""
        values = self.values()
        for name, value in values.items():
            self.state.fold(name, value)
        for target, twin in self._twins():
            if target.name in self.moving.touched:
                twin.weight.latent.data = self.state.matrix(target).float()
                if twin.bias is not None:
                    twin.bias.data = self.state.get(f"{target.name}.bias").clone()
            record = self.state.records[target.name]
            if record.sample is not None:
                record.sample = self.moving.inputs(target.name, record.sample.float()).to(record.sample.dtype)
        self.state.lends = None

    def _twins(self) -> list[tuple[Target, FakeLayer]]:
        found = [(target, self.state.installed(target)) for target in self.state.targets]
        return [(target, twin) for target, twin in found if isinstance(twin, FakeLayer)]


def transformed(state: BlockState) -> Transformed | None:
    """The transform that a block is learned with."""
    return state.lends if isinstance(state.lends, Transformed) else None


def begin_transform(window: Window, number: int, options: Reconstruction) -> None:
    """Let the learned transform of a recipe begin in one of the window's blocks, if that has places for it.

    A block that came with one from the window before goes on with it.
    """
    state, adapter = window.blocks[number], window.calibration.adapter
    if options.block is None or adapter is None or state.lends is not None:
        return
    found = [
        (place, fold)
        for place, fold in places_of(state, adapter, window.calibration.config)
        if options.block.takes(place) and _follows(state, place)
    ]
    extents = extents_of(window.only(number, window.part), [fold for _, fold in found], "float")
    seen = [
        (place, extent)
        for (place, fold), extent in zip(found, extents, strict=True)
        if fold is None or extent is not None
    ]
    moving = options.block.begin([place for place, _ in seen], [extent for _, extent in seen])
    _tell(state, options.block, moving)
    if seen:
        state.lends = Transformed(state, moving)


def resume_transform(
    window: Window, options: Reconstruction, names: Sequence[str], tensors: Mapping[str, Tensor]
) -> None:
    """Let the block of a window have the transform that it came with from an earlier run.

    Args:
        window: one block.
        options: of the engine.
        names: of the transform's places.
        tensors: its state.
    """
    state, adapter = window.block, window.calibration.adapter
    if options.block is None or adapter is None or not names or state.lends is not None:
        return
    known = {place.name: place for place, _ in places_of(state, adapter, window.calibration.config)}
    moving = options.block.begin([known[name] for name in names], None)
    moving.load_state_dict(tensors)
    state.lends = Transformed(state, moving)


@contextmanager
def learning_through(window: Window) -> Iterator[None]:
    """Let transforms see what the ranges of attention's operands cost, where these are measured."""
    blocks = [state.module for state in window.blocks if state.lends is not None]
    parts = [part for block in blocks for part in block.modules() if isinstance(part, ActivationQuantizer)]
    try:
        for part in parts:
            part.through = True
        yield
    finally:
        for part in parts:
            part.through = False


def _follows(state: BlockState, place: Place) -> bool:
    """Whether everything that a place touches can be rounded anew from other float weights."""
    for target in state.targets:
        if target.name not in (*place.makers, *place.readers):
            continue
        layer = state.installed(target)
        if isinstance(layer, FakeLayer):
            continue
        if not isinstance(layer, QuantLayer):
            return False
        packed = layer.weight.qtensor() if isinstance(layer.weight, Packed) else None
        blocks = isinstance(packed, BlockQTensor) and state.records[target.name].quantizer is not None
        if packed is not None and not blocks:
            return False
    return True


def _tell(state: BlockState, transform: LearnedTransform, moving: Moving) -> None:
    """What the transform works on in a block, as a note of every layer that it could touch."""
    key = LearnedTransform.registry.key_of(transform)
    for target in state.targets:
        record = state.records.get(target.name)
        if record is not None and target.kind.shares_input:
            names = [place.name for place in moving.places if target.name in (*place.makers, *place.readers)]
            where = f"of {moving.told(names)}" if names else "finds nothing to rescale here"
            record.notes.append(f"transform {key}: {where}")


def _of(state: BlockState, values: Mapping[str, Tensor], name: str) -> Tensor:
    return values[name] if name in values else state.get(name)


def _live(state: BlockState, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    found: Tensor = getattr(state.module.get_submodule(owner), leaf)
    return found
