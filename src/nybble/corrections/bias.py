"""Bias correction of convolutions: the mean error of every output channel goes into its bias.

Nagel et al. 2021, arXiv:2106.08295, section 3.2 (empirical bias correction); Nagel et al. 2019, arXiv:1906.04721.
Channels of a depthwise convolution often have inputs with a large mean (behind a BatchNorm and ReLU) and kernels that
nearly cancel it, so a rounding error of theirs is a shift of the whole channel. A convolution is corrected behind those
that run before it, so it makes up for what they lost too. One pass is enough: every output is corrected on its way, by
what its own batch shows; the bias gets the mean over the batches, which are made as large as memory lets them be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nybble.calibration.trace import BlockCall
from nybble.calibration.watch import Batches

MOST = 1 << 23  # values that enter the network at once: 55 images of 3 x 224 x 224
Means = list[dict[str, list[Tensor]]]
"""By batch and convolution, of every call: the mean of each output channel, float32 [channels]."""


def large(batches: Batches) -> Batches:
    """The same inputs in batches of at most ``MOST`` values; for blocks that take nothing but their hidden states."""

    def merged() -> Iterator[tuple[BlockCall, Tensor]]:
        waiting: list[tuple[BlockCall, Tensor]] = []
        for call, hidden in batches():
            if waiting and sum(x.numel() for _, x in waiting) + hidden.numel() > MOST:
                yield waiting[0][0], torch.cat([x for _, x in waiting])
                waiting = []
            waiting.append((call, hidden))
        yield waiting[0][0], torch.cat([x for _, x in waiting])

    return merged


@torch.no_grad()
def output_means(block: nn.Module, names: Sequence[str], batches: Batches) -> Means:
    """Run a block and note the mean outputs of its convolutions.

    Args:
        block: in float.
        names: of convolutions in it.
        batches: its inputs.
    """
    found: Means = []

    def note(name: str, y: Tensor) -> None:
        found[-1].setdefault(name, []).append(_channel_means(y))

    with _watching(block, names, note):
        for call, hidden in batches():
            found.append({})
            call.run(block, hidden)
    return found


@torch.no_grad()
def correct_biases(block: nn.Module, names: Sequence[str], batches: Batches, means: Means) -> None:
    """Add to the biases of convolutions what their outputs lack.

    Args:
        block: quantized; changed in place. A convolution without a bias stays as it is.
        names: of convolutions in it.
        batches: the inputs of which ``means`` were taken.
        means: from :func:`output_means`.
    """
    biases = {name: bias for name in names if isinstance(bias := block.get_submodule(name).bias, Tensor)}
    lacking: dict[str, list[Tensor]] = {name: [] for name in biases}
    left: dict[str, list[Tensor]] = {}

    def correct(name: str, y: Tensor) -> Tensor:
        lack = left[name].pop(0) - _channel_means(y)
        lacking[name].append(lack)
        return y + lack.to(y.dtype).view(-1, *[1] * (y.dim() - 2))

    with _watching(block, list(biases), correct):
        for (call, hidden), wanted in zip(batches(), means, strict=True):
            left = {name: list(each) for name, each in wanted.items()}
            call.run(block, hidden)
    for name, bias in biases.items():
        if lacking[name]:
            bias.data = (bias.float() + torch.stack(lacking[name]).mean(0)).to(bias.dtype)


def _channel_means(y: Tensor) -> Tensor:
    """Of an output [images, channels, ...]."""
    return y.float().transpose(0, 1).flatten(1).mean(1)


@contextmanager
def _watching(block: nn.Module, names: Sequence[str], see: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Let ``see`` look at, or replace, the outputs of modules."""
    handles = [
        block.get_submodule(name).register_forward_hook(lambda _module, _args, y, name=name: see(name, y))
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
