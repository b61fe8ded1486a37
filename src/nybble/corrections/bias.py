"""Bias correction: the mean error of every output channel goes into the layer's bias.

Nagel et al. 2021, arXiv:2106.08295, section 3.2 (empirical bias correction); Nagel et al. 2019, arXiv:1906.04721.
Channels of a depthwise convolution often have inputs with a large mean (behind a BatchNorm and ReLU) and kernels that
nearly cancel it, so a rounding error of theirs is a shift of the whole channel. A layer is corrected behind those that
run before it, so it makes up for what they lost too. One pass is enough: every output is corrected on its way, by what
its own batch shows; the bias gets the mean over the batches, which are made as large as memory lets them be. A layer
without a bias stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nybble.calibration.trace import HIDDEN, BlockCall, Tensors
from nybble.calibration.window import Batches, Window
from nybble.corrections import Correction
from nybble.nn.kinds import Target
from nybble.nn.swap import hold_dense

MOST = 1 << 23  # values that enter the network at once: 55 images of 3 x 224 x 224
Means = list[dict[str, list[Tensor]]]
"""By batch and layer, of every call: the mean of each output channel, float32 [channels]."""


@dataclass(frozen=True, kw_only=True)
class Bias(Correction):
    """``targets: [Conv]`` corrects convolutions alone, where it matters most."""

    reads_inputs: ClassVar[bool] = True

    def can_take(self, target: Target) -> bool:  # noqa: D102
        return target.kind.shares_input

    def run(self, window: Window, targets: Sequence[Target], path: str) -> None:  # noqa: D102
        state, batches = window.block, _large(window.batches(path))
        first = {target.name: target.kind.channels_first for target in targets}
        with state.on("float") as module:
            means = output_means(module, first, batches)
        hold_dense(state.module, window.calibration.dtype)
        moved = correct_biases(state.module, first, batches, means)
        hold_dense(state.module, None)
        for name, by in moved.items():
            state.records[name].changed = True
            state.records[name].notes.append(f"bias moved by {by:.3g} on average")


def _large(batches: Batches) -> Batches:
    """The same inputs in batches of at most ``MOST`` values, where blocks take nothing but their hidden states."""

    def merged() -> Iterator[tuple[BlockCall, Tensors]]:
        waiting: list[tuple[BlockCall, Tensor]] = []
        for call, given in batches():
            if set(given) != {HIDDEN} or any(isinstance(x, Tensor) for x in (*call.args, *call.kwargs.values())):
                yield call, given
                continue
            if waiting and sum(x.numel() for _, x in waiting) + given[HIDDEN].numel() > MOST:
                yield waiting[0][0], {HIDDEN: torch.cat([x for _, x in waiting])}
                waiting = []
            waiting.append((call, given[HIDDEN]))
        if waiting:
            yield waiting[0][0], {HIDDEN: torch.cat([x for _, x in waiting])}

    return merged


@torch.no_grad()
def output_means(block: nn.Module, layers: Mapping[str, bool], batches: Batches) -> Means:
    """Run a block and note the mean outputs of some layers.

    Args:
        block: in float.
        layers: names in it -> whether channels are the second dimension of what it gives, and not the last.
        batches: its inputs.
    """
    found: Means = []

    def note(name: str, y: Tensor, mask: Tensor | None) -> None:
        found[-1].setdefault(name, []).append(_channel_means(y, layers[name], mask))

    with _watching(block, layers, note) as current:
        for call, given in batches():
            found.append({})
            current["mask"] = call.mask
            call.run(block, given)
    return found


@torch.no_grad()
def correct_biases(block: nn.Module, layers: Mapping[str, bool], batches: Batches, means: Means) -> dict[str, float]:
    """Add to the biases of layers what their outputs lack.

    Args:
        block: quantized; changed in place. A layer without a bias stays as it is.
        layers: as for :func:`output_means`.
        batches: the inputs of which ``means`` were taken.
        means: from :func:`output_means`.

    Returns:
        By name, how far the biases moved on average.
    """
    biases = {name: bias for name in layers if isinstance(bias := block.get_submodule(name).bias, Tensor)}
    lacking: dict[str, list[Tensor]] = {name: [] for name in biases}
    left: dict[str, list[Tensor]] = {}

    def correct(name: str, y: Tensor, mask: Tensor | None) -> Tensor:
        lack = left[name].pop(0) - _channel_means(y, layers[name], mask)
        lacking[name].append(lack)
        lack = lack.to(y.dtype)
        return y + (lack.view(-1, *[1] * (y.dim() - 2)) if layers[name] and y.dim() > 2 else lack)

    with _watching(block, biases, correct) as current:
        for (call, given), wanted in zip(batches(), means, strict=True):
            left = {name: list(each) for name, each in wanted.items()}
            current["mask"] = call.mask
            call.run(block, given)
    moved = {}
    for name, bias in biases.items():
        if lacking[name]:
            by = torch.stack(lacking[name]).mean(0)
            bias.data = (bias.float() + by).to(bias.dtype)
            moved[name] = float(by.abs().mean())
    return moved


def _channel_means(y: Tensor, second: bool, mask: Tensor | None) -> Tensor:
    """Of an output [images, channels, ...] or [..., channels], the rows of padding left out."""
    if second:
        return y.float().transpose(0, 1).flatten(1).mean(1)
    rows = y[mask] if mask is not None and y.shape[:2] == mask.shape else y
    return rows.float().reshape(-1, rows.shape[-1]).mean(0)


@contextmanager
def _watching(
    block: nn.Module, names: Mapping[str, Any], see: Callable[[str, Tensor, Tensor | None], Tensor | None]
) -> Iterator[dict[str, Tensor | None]]:
    """Let ``see`` look at, or replace, the outputs of modules; yields where the batch's mask is to be put."""
    current: dict[str, Tensor | None] = {"mask": None}
    handles = [
        block.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: see(name, y, current["mask"]))
        for name in names
    ]
    try:
        yield current
    finally:
        for handle in handles:
            handle.remove()


PART = Bias
