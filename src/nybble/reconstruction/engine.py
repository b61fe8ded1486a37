"""The one engine: put trainable twins where quantized layers stand, and move their parts until the window fits.

The window's inputs come from the path that the recipe says, what it should give from the float path. A step takes one
batch; batches go round in an order that a seed decides. Blocks that stay for the next window keep their twins, and what
these learned. Where what was reached loses more than the window did at the start, as the solver left it, it goes back.

==============  =====================================================================================
twins           trainable layers in a block, and back
targets         what the window should give, for every batch
optimizing      update rules, learning rates, clipped gradients
training        the loop over steps; keeping: the best state of it; inputs: what a step is fed
gradients       forward and backward of a step; on a GPU recorded, and replayed
moves           what it did, as numbers for the report
==============  =====================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.calibration.window import Window
from nybble.core.errors import LearningError
from nybble.nn.fake import FakeLayer
from nybble.reconstruction import REGISTRY, Reconstruction
from nybble.reconstruction.moves import curve, short
from nybble.reconstruction.targets import Wanted, output_of, wanted_of
from nybble.reconstruction.training import Trained, train
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
    that the ``best`` state was at), whether it ``diverged``, the ``precision`` of products where it was another than
    the model's; and the first layer's record its ``curve``: ``[step, loss]``.

    Args:
        window: quantized, with a float path, and the path that ``options.feed`` names.
        options: what to learn, and how.

    Raises:
        LearningError: the loss is no number; the window is what it was before then.
    """
    with wanted_of(window, options.targets) as wanted:
        losses = _evaluate(window, options, wanted)
        before = sum(losses) / len(losses)
        carried = {twin: _state_of(twin) for state in window.blocks for twin in twins_of(state).values()}
        for state in window.blocks:
            put_twins(state, [target for target in state.targets if options.learns(target)], options)
        twins = [twin for state in window.blocks for twin in twins_of(state).values()]
        groups = _groups(twins)
        if not groups:  # a code book: codes as the solver left them
            _go_back(window, carried)
            text = f"window of {len(window.blocks)}: nothing in it can be learned; as the solver left it"
            _note(window, options, text)
            return Outcome(before=before, after=before, kept=False)
        try:
            with torch.enable_grad(), _frozen(window, twins):
                trained = train(window, options, wanted, twins, groups, losses, _judge(window, options, wanted))
            after = _mean(_evaluate(window, options, wanted))
            if not math.isfinite(after):
                raise LearningError(f"the reconstruction of {window.part} came to {after}; take smaller rates.")
        except LearningError:
            _go_back(window, carried)
            raise
    kept = after <= before
    if not kept:
        _go_back(window, carried)
    _say(window, options, trained, before, after)
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
                twin.eval()
            elif isinstance(twin, FakeLayer):
                state.replace(target, state.packed()[state.place(target)])


@torch.no_grad()
def _evaluate(window: Window, options: Reconstruction, wanted: Wanted) -> list[float]:
    """The loss of every batch of the window as it would be stored."""
    for state in window.blocks:
        for twin in twins_of(state).values():
            twin.eval()
    found = []
    for number, (calls, given) in enumerate(window.inputs(options.feed)):
        output = output_of(window, calls, given, "quantized")
        found.append(float(options.loss(output, wanted[number], calls[0].mask)))
    return found


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)


def _judge(window: Window, options: Reconstruction, wanted: Wanted) -> Any:
    """What ``keep=best`` asks every so many steps."""
    return lambda: _mean(_evaluate(window, options, wanted))


def _groups(twins: Sequence[FakeLayer]) -> dict[str, list[nn.Parameter]]:
    """What is learned, by learning-rate group."""
    groups: dict[str, list[nn.Parameter]] = {}
    for learned in (part for twin in twins for _, part in twin.learned()):
        for name, parameters in learned.groups().items():
            groups.setdefault(name, []).extend(parameters)
    return groups


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
        for target in state.targets:
            if options.learns(target) and target.name in state.records:
                state.records[target.name].notes.append(text)
                found.append(state.records[target.name])
    return found
