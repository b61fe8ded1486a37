"""The loop over steps: batch after batch, until the steps are done or it diverges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nybble.calibration.finite import require_number
from nybble.calibration.trace import BlockCall
from nybble.calibration.window import Window
from nybble.core.keeping import Best
from nybble.nn.fake import FakeLayer
from nybble.reconstruction import Reconstruction, halves
from nybble.reconstruction.gradients import Gradients
from nybble.reconstruction.inputs import rounds
from nybble.reconstruction.optimizing import Mover
from nybble.reconstruction.targets import Wanted, output_of
from nybble.reconstruction.twins import twins_of


@dataclass(kw_only=True)
class Trained:
    """What training came to.

    Attributes:
        losses: of every step's batch, without penalties.
        best: the step whose state it ended with, where that was chosen and isn't the last: by ``keep``, or, where it
            diverged, the end of the round over all batches that lost least.
        diverged: whether it was stopped.
        precision: of products, where it was another than the model's.
    """

    losses: list[float] = field(default_factory=list)
    best: int | None = None
    diverged: bool = False
    precision: torch.dtype | None = None


def train(
    window: Window,
    options: Reconstruction,
    wanted: Wanted,
    twins: Sequence[FakeLayer],
    groups: Mapping[str, list[nn.Parameter]],
    before: Sequence[float],
    judge: Callable[[], float],
) -> Trained:
    """Move what the twins learn.

    Args:
        window: with its twins in place.
        options: of the engine.
        wanted: targets by batch.
        twins: all that the window has.
        groups: their parameters by learning-rate group.
        before: each batch's loss at the start.
        judge: the window's loss over all batches as it would be stored; leaves the twins in eval mode.

    Raises:
        LearningError: a loss is no number; names the layer whose output is none.
    """
    scale, mover, trained = sum(before) / len(before), Mover(groups, options), Trained()
    best, ends = Best(mover.parameters), Best(mover.parameters)
    trained.precision = _precision(window, options)
    large = next(iter(wanted[0].values())).numel() >= halves.LEAST
    shared = halves.halves_for(window, options, twins, mover.parameters) if large else None
    _train_mode(twins)
    gradients = Gradients(window, options, twins, mover, scale, trained.precision, shared)
    for step, (number, calls, given) in enumerate(rounds(window, options)):
        error, loss = gradients.of(calls, given, wanted[number], step)
        _check(loss, step, window, calls, given, gradients)
        trained.losses.append(error)
        if options.keep == "best" and not options.every:
            best.see(trained.losses[-1] / (before[number] or 1.0), step)
        mover.move()
        if options.every and (step + 1) % options.every == 0 and step + 1 < options.steps:
            gradients.sync()
            best.see(judge(), step + 1)
            _train_mode(twins)
        if options.diverged and len(trained.losses) % len(before) == 0:
            lost = sum(trained.losses[-len(before) :]) / len(before)
            trained.diverged = 0 < options.diverged * scale < lost
            if trained.diverged:
                break
            if options.keep == "last" and lost < scale:
                ends.see(lost, step + 1)
    if options.every:
        gradients.sync()
        best.see(judge(), len(trained.losses))
    if trained.diverged and options.keep == "last":
        best = ends
    if 0 <= best.step < len(trained.losses):
        best.restore()
        trained.best = best.step
    gradients.sync()
    return trained


def _train_mode(twins: Sequence[FakeLayer]) -> None:
    for twin in twins:
        twin.train()


def _precision(window: Window, options: Reconstruction) -> torch.dtype | None:
    """bfloat16 where it is asked for, the model is in float32, and the device has it; None: as the model."""
    device = window.calibration.device
    if options.precision == "model" or window.calibration.dtype != torch.float32:
        return None
    has = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.bfloat16 if has else None


def _check(
    loss: float,
    step: int,
    window: Window,
    calls: Sequence[BlockCall],
    given: Mapping[str, Tensor],
    gradients: Gradients,
) -> None:
    """Raise LearningError for a batch whose loss is no number."""

    def again() -> None:
        gradients.sync()
        output_of(window, calls, given, "quantized")

    require_number(loss, step, window.part, named_twins(window), again)


def named_twins(window: Window) -> dict[str, FakeLayer]:
    """The twins of a window by the names that the model has for their layers."""
    return {f"{state.prefix}{name}": twin for state in window.blocks for name, twin in twins_of(state).items()}
