"""The one engine: put trainable twins where quantized layers stand, and move their parts until the window fits.

The window's inputs come from the path that the recipe says, what it should give from the float path. A step takes one
batch; batches go round in an order that a seed decides. Blocks that stay for the next window keep their twins, and what
these learned. Where what was reached loses more than the window did at the start, as the solver left it, it goes back.

==============  =====================================================================================
twins           trainable layers in a block, and back; norms: those that learn beside them
targets         what the window should give, for every batch
optimizing      update rules, learning rates, clipped gradients
training        the loop over steps; inputs: what a step is fed
gradients       forward and backward of a step; on a GPU recorded, and replayed
transforming    a learned transform of a block's float weights
in_units        around it: a block learned in parts, residual block by residual block or layer by layer
moves           what it did, as numbers for the report
==============  =====================================================================================
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.calibration.block import BlockState
from nybble.calibration.finite import require_number
from nybble.calibration.window import Window
from nybble.core import ranks
from nybble.core.curve import curve, short
from nybble.core.errors import LearningError
from nybble.learned import Learned
from nybble.learned.transforms import Moving
from nybble.nn.fake import FakeLayer
from nybble.nn.kinds import Target
from nybble.nn.learned_norm import LearnedNorm
from nybble.reconstruction import REGISTRY, Reconstruction
from nybble.reconstruction.norms import norms_of, put_norms
from nybble.reconstruction.targets import Wanted, output_of, wanted_of
from nybble.reconstruction.training import Trained, named_twins, train
from nybble.reconstruction.transforming import begin_transform, learning_through, transformed
from nybble.reconstruction.twins import put_twins, twins_of


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Losses over all batches: of the window as it came, and as it is left."""

    before: float
    after: float
    kept: bool


def reconstruct(window: Window, options: Reconstruction) -> Outcome:
    """Learn on a window; see the module's docstring.

    Every layer's record gets a note, and in ``learned["windows"]`` the window's name, how many ``blocks`` it has, the
    ``loss``, ``before`` and ``after`` over all batches, the ``steps`` taken, ``kept`` (``last``, ``start``, or the step
    that the ``best`` state was at), whether it ``diverged``, how many ``norms`` learned where they were asked to, the
    ``precision`` of products where it was another than the model's; and the first layer's record its ``curve``:
    ``[step, loss]``. Seconds stand in ``window.calibration.times``, apart from what the same inputs make alike.

    Args:
        window: quantized, with a float path, and the path that ``options.feed`` names.
        options: what to learn, and how.

    Raises:
        LearningError: the loss is no number; the window is what it was before then.
    """
    started = time.perf_counter()
    with wanted_of(window, options.targets) as wanted:
        losses = _evaluate(window, options, wanted)
        before = sum(losses) / len(losses)
        carried = {part: _state_of(part) for state in window.blocks for part in _learning(state)}
        for number, state in enumerate(window.blocks):
            begin_transform(window, number, options)
            put_twins(state, _learned(state, options), options)
            if options.norms and twins_of(state):  # not of a block that stays in float
                put_norms(state)
        twins = [twin for state in window.blocks for twin in twins_of(state).values()]
        groups = _groups(window, twins, options)
        if not groups:  # blocks in float, or stored as no part learns: as the solver left them
            _go_back(window, carried)
            text = f"window of {len(window.blocks)}: nothing in it can be learned; as the solver left it"
            _note(window, options, text)
            return Outcome(before=before, after=before, kept=False)
        judge = _judge(window, options, wanted)
        try:
            with torch.enable_grad(), _frozen(window, groups), learning_through(window):
                trained = train(window, options, wanted, twins, groups, losses, judge)
            after = judge()
            require_number(after, len(trained.losses), window.part, named_twins(window), judge)
        except LearningError:
            _go_back(window, carried)
            raise
    kept = after <= before
    if not kept:
        _go_back(window, carried)
    _say(window, options, trained, before, after)
    window.calibration.times.setdefault(window.part, []).append(time.perf_counter() - started)
    return Outcome(before=before, after=min(before, after), kept=kept)


def _learned(state: BlockState, options: Reconstruction) -> list[Target]:
    """The targets of a block of which something is learned: of their own, or with the block."""
    change = transformed(state)
    touched = frozenset() if change is None else change.moving.touched
    return [target for target in state.targets if options.learns(target) or target.name in touched]


def _learning(state: BlockState) -> list[nn.Module]:
    """All that has something to learn in a block: its twins and norms, and its transform."""
    change = transformed(state)
    return [*twins_of(state).values(), *_norms(state), *(() if change is None else (change.moving,))]


def _norms(state: BlockState) -> list[LearnedNorm]:
    return list(norms_of(state).values())


def _state_of(part: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in part.state_dict().items()}


def _go_back(window: Window, carried: Mapping[nn.Module, Mapping[str, Tensor]]) -> None:
    """Every layer as it was before the window was learned."""
    for state in window.blocks:
        change = transformed(state)
        if change is not None and change.moving in carried:
            change.moving.load_state_dict(carried[change.moving])
        else:
            state.lends = None
        for target in state.targets:
            twin = state.installed(target)
            if isinstance(twin, FakeLayer) and twin in carried:
                twin.load_state_dict(carried[twin])
                twin.eval()
            elif isinstance(twin, FakeLayer):
                state.replace(target, state.packed()[state.place(target)])
        for name, norm in norms_of(state).items():
            if norm in carried:
                norm.load_state_dict(carried[norm])
            else:
                state.stand_in(name, None)


@torch.no_grad()
def _evaluate(window: Window, options: Reconstruction, wanted: Wanted) -> list[float]:
    """The loss of every batch of the window as it would be stored."""
    for state in window.blocks:
        for twin in twins_of(state).values():
            twin.eval()
    own = []
    for number, calls, given in window.own_inputs(options.feed):
        output = output_of(window, calls, given, "quantized")
        own.append(float(options.loss(output, wanted[number], calls[0].mask)))
    return [loss for losses in ranks.gather(own) for loss in losses]


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)


def _judge(window: Window, options: Reconstruction, wanted: Wanted) -> Callable[[], float]:
    """What ``keep=best`` asks every so many steps, and what is asked at the end."""
    return lambda: _mean(_evaluate(window, options, wanted))


def _groups(window: Window, twins: Sequence[FakeLayer], options: Reconstruction) -> dict[str, list[nn.Parameter]]:
    """What is learned, by learning-rate group."""
    groups: dict[str, list[nn.Parameter]] = {}
    parts: list[Learned | Moving] = [part for twin in twins for _, part in twin.learned()]
    parts += [change.moving for state in window.blocks if (change := transformed(state)) is not None]
    for learned in parts:
        for name, parameters in learned.groups().items():
            groups.setdefault(name, []).extend(parameters)
    norms = [parameter for state in window.blocks for norm in _norms(state) for parameter in norm.parameters()]
    biases = [twin.bias for twin in twins if twin.bias is not None]
    beside = (("norms", options.norms, norms), ("biases", options.biases, biases))
    return groups | {name: parameters for name, asked, parameters in beside if asked and parameters}


@contextmanager
def _frozen(window: Window, groups: Mapping[str, Sequence[nn.Parameter]]) -> Iterator[None]:
    """Let nothing but what is learned ask for gradients."""
    wanted = {id(parameter) for parameters in groups.values() for parameter in parameters}
    asked = {p: p.requires_grad for state in window.blocks for p in state.module.parameters()}
    try:
        for parameter in asked:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, was in asked.items():
            parameter.requires_grad_(was)
            parameter.grad = None


def _say(window: Window, options: Reconstruction, trained: Trained, before: float, after: float) -> None:
    """What was done, to people and to the report."""
    kept: str | int = "start" if after > before else "last" if trained.best is None else trained.best
    text = f"window of {len(window.blocks)}: output error {before:.3g} -> {after:.3g}"
    if kept == "start":
        text = f"reconstruction would have raised the window's error ({before:.3g} -> {after:.3g}): went back"
    elif trained.best is not None:
        text += f", the best state, of step {trained.best} of {len(trained.losses)}"
    if trained.diverged:
        text += f"; it diverged and was stopped at step {len(trained.losses)} of {options.steps}"
    entry: dict[str, Any] = {
        "window": window.part, "blocks": len(window.blocks), "loss": REGISTRY.key_of(options),
        "before": short(before), "after": short(after), "steps": len(trained.losses), "kept": kept,
        "diverged": trained.diverged,
    }  # fmt: skip
    if options.norms:
        entry["norms"] = sum(len(norms_of(state)) for state in window.blocks)
    if trained.precision is not None:
        entry["precision"] = str(trained.precision).removeprefix("torch.")
    first = {**entry, "curve": curve(trained.losses)}
    for record in _note(window, options, text):
        found = record.learned or {}
        record.learned = {**found, "windows": [*found.get("windows", ()), first]}
        first = entry


def _note(window: Window, options: Reconstruction, text: str) -> list[Any]:
    """Add a note to the records of what is learned; returns them."""
    found = []
    for state in window.blocks:
        learned = _learned(state, options)
        for target in state.targets:
            if target in learned and target.name in state.records:
                state.records[target.name].notes.append(text)
                found.append(state.records[target.name])
    return found
