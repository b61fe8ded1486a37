"""Trainable twins in a block: put where quantized layers stand, found, and settled into packed layers again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

from torch import Tensor

from nybble.calibration.block import BlockState, Record
from nybble.learned import ACTIVATIONS, WEIGHTS, Learned, Part
from nybble.learned._fixed import Fixed
from nybble.learned._split import SplitLearned
from nybble.learned._vectors import VectorPart
from nybble.learned.ste import StraightThrough
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.fake import FakeLayer
from nybble.nn.kinds import Target
from nybble.nn.layer import QuantLayer
from nybble.nn.packed import Packed
from nybble.qtensor import QTensor
from nybble.qtensor.block import BlockQTensor
from nybble.qtensor.split import SplitQTensor
from nybble.qtensor.vector import VectorQTensor
from nybble.quantizer import Quantizer
from nybble.reconstruction import Reconstruction
from nybble.reconstruction.moves import moves
from nybble.reconstruction.norms import settle_norms
from nybble.reconstruction.transforming import transformed


def put_twins(state: BlockState, targets: Sequence[Target], options: Reconstruction) -> None:
    """Let a trainable twin stand for each quantized layer whose parts are learned.

    It begins with that one's scales. A learned weight begins at the float one, so GPTQ's codes are not kept, unless the
    part keeps codes.
    """
    for target in targets:
        layer = state.installed(target)
        if isinstance(layer, QuantLayer):
            state.replace(target, _twin(state, target, layer, options).eval())  # as it would be stored


def _twin(state: BlockState, target: Target, layer: QuantLayer, options: Reconstruction) -> FakeLayer:
    truth, record, change = state.matrix(target).float(), state.records[target.name], transformed(state)
    begin, sample = truth, None if record.sample is None else record.sample.float()
    if change is not None and target.name in change.moving.touched:
        begin = change.matrix(target, change.values()).detach()
        sample = None if sample is None else change.moving.inputs(target.name, sample)
    weights: Learned | None = None
    if isinstance(layer.weight, Packed):
        weights = _weights(layer.weight.qtensor(), begin, record, options, begin is not truth)
    inputs: Learned | ActivationQuantizer | None = layer.inputs
    if options.inputs is not None and layer.inputs is not None and sample is not None:
        inputs = options.inputs.make(layer.inputs.quantizer, sample, record.inputs[1], ACTIVATIONS)
    elif change is not None:
        inputs = _following(layer.inputs)
    outputs = layer.outputs if change is None else _following(layer.outputs)
    like, folded = state.float_module(target.module), state.folded.get(target.name, "")
    twin = FakeLayer(like, truth, weights, inputs, outputs, trainable=False, folded=folded)
    twin.rounds_inputs = options.rounds_inputs
    return twin


def _following(given: ActivationQuantizer | None) -> StraightThrough | None:
    """A quantizer of activations through whose measured scales a transform learns."""
    return None if given is None else StraightThrough(given.quantizer, ACTIVATIONS, given.params(), through=True)


def _weights(packed: QTensor, truth: Tensor, record: Record, options: Reconstruction, moved: bool) -> Learned:
    """What rounds a weight: the learned part where there is one for it, else the codes as they are.

    Of a split tensor the parts in the record's quantizer learn, the others (outlier columns) stay. Of a weight that a
    transform has ``moved`` the solver's scales fit nothing.
    """
    part, quantizer = options.follower if moved else options.weights, record.quantizer
    if isinstance(part, VectorPart):
        if isinstance(packed, VectorQTensor) and quantizer is not None:
            return part.make_vectors(quantizer, truth, packed)
    elif part is not None and quantizer is not None:
        if isinstance(packed, BlockQTensor):
            return _made(part, quantizer, packed, truth, moved)
        if isinstance(packed, SplitQTensor):
            pairs = zip(packed.parts, packed.slices(), strict=True)
            found = [
                _made(part, quantizer, own, truth.index_select(packed.dim, at), moved)
                if _is_in(own, quantizer)
                else None
                for own, at in pairs
            ]
            if any(found):
                return SplitLearned(packed, found, quantizer)
    return Fixed(packed, quantizer or Quantizer("int8"))


def _is_in(part: QTensor | Tensor, quantizer: Quantizer) -> TypeGuard[BlockQTensor]:
    cut = (quantizer.format, quantizer.granularity)
    return isinstance(part, BlockQTensor) and (part.format, part.granularity) == cut


def _made(part: Part, quantizer: Quantizer, packed: BlockQTensor, truth: Tensor, moved: bool) -> Learned:
    x = packed.dequantize() if part.keeps_codes else truth
    return part.make(quantizer, x, packed if part.takes_start and not moved else None, WEIGHTS)


def settle_twins(state: BlockState) -> None:
    """Let the packed layers that the twins of a block come to stand in their place; and normalisation layers.

    A learned transform is folded.
    """
    settle_norms(state)
    change = transformed(state)
    if change is not None:
        change.settle()
    for target in state.targets:
        twin = state.installed(target)
        if isinstance(twin, FakeLayer):
            began = state.packed()[state.place(target)]
            settled = twin.eval().settle()
            state.replace(target, settled)
            record = state.records[target.name]
            record.changed = True
            if isinstance(began, QuantLayer):
                found = moves(state.matrix(target).float(), record.quantizer, began, settled)
                record.learned = {**(record.learned or {}), **found}
            if settled.inputs is not None:
                record.inputs = settled.inputs.quantizer, settled.inputs.params()


def twins_of(state: BlockState) -> dict[str, FakeLayer]:
    """The trainable twins of a block, by the target's name."""
    found = {target.name: state.installed(target) for target in state.targets}
    return {name: twin for name, twin in found.items() if isinstance(twin, FakeLayer)}
