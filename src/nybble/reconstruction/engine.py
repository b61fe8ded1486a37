"""The one engine: put trainable twins where quantized layers stand, and move their parts until the window fits.

The window's inputs come from the path that the recipe says, what it should give from the float path. A step takes one
batch; batches go round in an order that a seed decides. Blocks that stay for the next window keep their twins, and what
these learned. Where what was reached loses more than the window did at the start, as the solver left it, it goes back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.calibration.block import BlockState, Record
from nybble.calibration.trace import HIDDEN, BlockCall
from nybble.calibration.window import Window
from nybble.core.errors import DataError
from nybble.core.seeds import derive_seed
from nybble.learned import ACTIVATIONS, WEIGHTS, Learned
from nybble.learned._fixed import Fixed
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.fake import FakeLayer
from nybble.nn.kinds import Target
from nybble.nn.layer import QuantLayer
from nybble.nn.packed import Packed
from nybble.qtensor import QTensor
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.reconstruction import Reconstruction

DEFAULT_RATE = 1e-3


def put_twins(state: BlockState, targets: Sequence[Target], options: Reconstruction) -> None:
    """Let a trainable twin stand for each quantized layer whose parts are learned.

    It begins with that one's scales. A learned weight begins at the float one, so GPTQ's codes are not kept.
    """
    for target in targets:
        layer = state.installed(target)
        if isinstance(layer, QuantLayer):
            state.replace(target, _twin(state, target, layer, options).eval())  # as it would be stored


def _twin(state: BlockState, target: Target, layer: QuantLayer, options: Reconstruction) -> FakeLayer:
    truth, record = state.matrix(target).float(), state.records[target.name]
    weights: Learned | None = None
    if isinstance(layer.weight, Packed):
        weights = _weights(layer.weight.qtensor(), truth, record, options)
    inputs: Learned | ActivationQuantizer | None = layer.inputs
    if options.inputs is not None and layer.inputs is not None and record.sample is not None:
        start = record.inputs[1]
        inputs = options.inputs.make(layer.inputs.quantizer, record.sample.float(), start, ACTIVATIONS)
    like, folded = state.float_module(target.module), state.folded.get(target.name, "")
    return FakeLayer(like, truth, weights, inputs, layer.outputs, trainable=False, folded=folded)


def _weights(packed: QTensor, truth: Tensor, record: Record, options: Reconstruction) -> Learned:
    """What rounds a weight: the learned part where there is one for it, else the codes as they are."""
    if options.weights is not None and isinstance(packed, BlockQTensor) and record.quantizer is not None:
        return options.weights.make(record.quantizer, truth, packed if options.weights.takes_start else None, WEIGHTS)
    return Fixed(packed, record.quantizer or Quantizer("int8"))


def settle_twins(state: BlockState) -> None:
    """Let the packed layers that the twins of a block come to stand in their place."""
    for target in state.targets:
        twin = state.installed(target)
        if isinstance(twin, FakeLayer):
            settled = twin.eval().settle()
            state.replace(target, settled)
            record = state.records[target.name]
            record.changed = True
            if settled.inputs is not None:
                record.inputs = settled.inputs.quantizer, settled.inputs.params()


def twins_of(state: BlockState) -> dict[str, FakeLayer]:
    """The trainable twins of a block, by the target's name."""
    found = {target.name: state.installed(target) for target in state.targets}
    return {name: twin for name, twin in found.items() if isinstance(twin, FakeLayer)}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Losses over all batches: of the window as it came, and as it is left."""

    before: float
    after: float
    kept: bool


def reconstruct(window: Window, options: Reconstruction) -> Outcome:
    """Learn on a window; see the module's docstring.

    Args:
        window: quantized, with a float path, and the path that ``options.feed`` names.
        options: what to learn, and how.

    Raises:
        DataError: the loss is no number.
    """
    wanted = _wanted(window)
    before = _evaluate(window, options, wanted)
    carried = {twin: _state_of(twin) for state in window.blocks for twin in twins_of(state).values()}
    for state in window.blocks:
        put_twins(state, [target for target in state.targets if options.learns(target)], options)
    twins = [twin for state in window.blocks for twin in twins_of(state).values()]
    groups = _groups(twins)
    if not groups:  # a code book, a split tensor: codes as the solver left them
        _go_back(window, carried)
        _note(window, options, f"window of {len(window.blocks)}: nothing in it can be learned; as the solver left it")
        return Outcome(before=before, after=before, kept=False)
    with torch.enable_grad(), _frozen(window, twins):
        _train(window, options, wanted, twins, groups, before)
    after = _evaluate(window, options, wanted)
    if not math.isfinite(after):
        raise DataError(f"the reconstruction of {window.part} came to {after}; take smaller rates.")
    kept = after <= before
    if not kept:
        _go_back(window, carried)
    text = f"window of {len(window.blocks)}: output error {before:.3g} -> {after:.3g}"
    if not kept:
        text = f"reconstruction would have raised the window's error ({before:.3g} -> {after:.3g}): went back"
    _note(window, options, text)
    return Outcome(before=before, after=min(before, after), kept=kept)


def _state_of(twin: FakeLayer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in twin.state_dict().items()}


def _go_back(window: Window, carried: Mapping[FakeLayer, Mapping[str, Tensor]]) -> None:
    """Every layer as it was before the window was learned."""
    for state in window.blocks:
        for target in state.targets:
            twin = state.installed(target)
            if isinstance(twin, FakeLayer) and twin in carried:
                twin.load_state_dict(carried[twin])
            elif isinstance(twin, FakeLayer):
                state.replace(target, state.packed()[state.place(target)])


def _wanted(window: Window) -> list[Tensor]:
    """What the float blocks give, by batch."""
    return [_output(window, calls, given, "float") for calls, given in window.inputs("float")]


def _output(window: Window, calls: Sequence[BlockCall], given: Mapping[str, Tensor], path: str) -> Tensor:
    """What comes out of the window; of a whole network that gives several tensors by name, the first."""
    output: Any = window.run(calls, given, path)[HIDDEN]
    found: Tensor = next(iter(output.values())) if isinstance(output, Mapping) else output
    return found


def _evaluate(window: Window, options: Reconstruction, wanted: Sequence[Tensor]) -> float:
    """The loss over all batches of the window as it would be stored."""
    total = 0.0
    _train_mode(window, False)
    for (calls, given), goal in zip(window.inputs(options.feed), wanted, strict=True):
        output = _output(window, calls, given, "quantized")
        total += float(options.loss(output, goal, calls[0].mask))
    return total / len(wanted)


def _groups(twins: Sequence[FakeLayer]) -> dict[str, list[nn.Parameter]]:
    """What is learned, by learning-rate group."""
    groups: dict[str, list[nn.Parameter]] = {}
    for learned in (part for twin in twins for _, part in twin.learned()):
        for name, parameters in learned.groups().items():
            groups.setdefault(name, []).extend(parameters)
    return groups


def _train(
    window: Window,
    options: Reconstruction,
    wanted: Sequence[Tensor],
    twins: Sequence[FakeLayer],
    groups: Mapping[str, list[nn.Parameter]],
    scale: float,
) -> None:
    default = options.rates.get("default", DEFAULT_RATE)
    optimizer = torch.optim.Adam(
        [{"params": parameters, "lr": options.rates.get(name, default)} for name, parameters in groups.items()]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(options, step))
    _train_mode(window, True)
    for step, (number, calls, given) in enumerate(_rounds(window, options)):
        output = _output(window, calls, given, "quantized")
        loss = options.loss(output, wanted[number], calls[0].mask)
        loss = loss + options.penalty * scale * _penalty(twins, step / options.steps)
        if not math.isfinite(float(loss.detach())):
            raise DataError(f"the loss of {window.part} is {float(loss.detach())} at step {step}; take smaller rates.")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def _penalty(twins: Sequence[FakeLayer], t: float) -> Tensor:
    """The parts' penalties, a mean over all elements that they are sums over."""
    total = torch.stack([twin.penalty(t) for twin in twins]).sum()
    return total / sum(twin.weight.shape.numel() for twin in twins)


def _rounds(window: Window, options: Reconstruction) -> Iterator[tuple[int, Sequence[BlockCall], dict[str, Tensor]]]:
    """``steps`` batches with their numbers: all of them in a random order, then again in another."""
    generator = torch.Generator().manual_seed(derive_seed(window.calibration.seed, window.part, "order"))
    left = options.steps
    while left:
        order = torch.randperm(window.calibration.batches, generator=generator).tolist()[:left]
        left -= len(order)
        for number, (calls, given) in zip(order, window.inputs(options.feed, order=order), strict=True):
            yield number, calls, dict(given)


def _rate(options: Reconstruction, step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / options.steps)) if options.schedule == "cosine" else 1.0


def _train_mode(window: Window, on: bool) -> None:
    for state in window.blocks:
        for twin in twins_of(state).values():
            twin.train(on)


@contextmanager
def _frozen(window: Window, twins: Sequence[FakeLayer]) -> Iterator[None]:
    """Let nothing but the learned parts' own parameters ask for gradients."""
    wanted = {id(p) for twin in twins for _, part in twin.learned() for ps in part.groups().values() for p in ps}
    asked = {p: p.requires_grad for state in window.blocks for p in state.module.parameters()}
    try:
        for parameter in asked:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, was in asked.items():
            parameter.requires_grad_(was)
            parameter.grad = None


def _note(window: Window, options: Reconstruction, text: str) -> None:
    for state in window.blocks:
        for target in state.targets:
            if options.learns(target) and target.name in state.records:
                state.records[target.name].notes.append(text)
