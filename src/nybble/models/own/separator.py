"""A small network that separates voices: Conv-TasNet (Luo and Mesgarani 2019, arXiv:1809.07454), without causal parts.

Frames of the waveform go into a basis of filters, dilated convolutions make a mask for each voice, and the masked
frames are added up again. The decoder is a linear layer with overlap and add, which is a transposed convolution.

Frames are longer than the paper's (32 ms of 8,000 samples a second): drawn voices are harmonics without pulses, which
only frames of several periods of the pitch can part. Filters so long learn slowly from random ones, so they begin as
cosines and sines under a window, each with both signs for the ReLU, and the decoder as their transpose: with masks of 1
the network then gives back what it got.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput


class SeparatorConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Sizes, with the paper's names.

    Attributes:
        voices: C. filters: N, of ``window`` samples (L), half of which is the step; 2 L are a whole basis.
        width: B, channels between blocks. hidden: H, channels in them.
        depth: X, blocks of a repeat, dilated 1, 2, 4 ... repeats: R. rate: samples a second.
    """

    model_type = "nybble-separator"

    def __init__(
        self,
        voices: int = 2,
        filters: int = 512,
        window: int = 256,
        width: int = 64,
        hidden: int = 128,
        depth: int = 4,
        repeats: int = 2,
        rate: int = 8000,
        **more: Any,
    ) -> None:
        self.voices, self.filters, self.window, self.width, self.hidden = voices, filters, window, width, hidden
        self.depth, self.repeats, self.rate = depth, repeats, rate
        super().__init__(**more)


@dataclass
class Separated(ModelOutput):
    """``logits``: the voices, [mixtures, voices, samples]; ``loss``: minus their SI-SDR in dB, of labels."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class Block(nn.Module):
    """1 x 1, dilated depthwise and 1 x 1 convolution, beside the input."""

    def __init__(self, width: int, hidden: int, dilation: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(width, hidden, 1), nn.PReLU(), nn.GroupNorm(1, hidden),
            nn.Conv1d(hidden, hidden, 3, padding=dilation, dilation=dilation, groups=hidden), nn.PReLU(),
            nn.GroupNorm(1, hidden), nn.Conv1d(hidden, width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """[n, width, frames], as it came."""
        added: Tensor = x + self.layers(x)
        return added


class Separator(PreTrainedModel):  # type: ignore[no-untyped-call]
    """See the module."""

    config_class = SeparatorConfig
    main_input_name = "input_values"

    def __init__(self, config: SeparatorConfig) -> None:
        super().__init__(config)
        c = config
        self.encoder = nn.Conv1d(1, c.filters, c.window, c.window // 2, bias=False)
        blocks = [Block(c.width, c.hidden, 2**i) for _ in range(c.repeats) for i in range(c.depth)]
        self.masks = nn.Sequential(
            nn.GroupNorm(1, c.filters), nn.Conv1d(c.filters, c.width, 1), *blocks, nn.PReLU(),
            nn.Conv1d(c.width, c.voices * c.filters, 1), nn.Sigmoid(),
        )  # fmt: skip
        self.decoder = nn.Linear(c.filters, c.window, bias=False)
        with torch.no_grad():
            basis = fourier_filters(c.filters, c.window).to(self.encoder.weight)
            self.encoder.weight.copy_(basis[:, None])
            self.decoder.weight.copy_(basis.T)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Other weights begin as torch draws them: transformers' own, of one deviation for all, learn much slower."""

    def forward(self, input_values: Tensor, labels: Tensor | None = None) -> Separated:
        """Separate, and compare with labels where they are given.

        Args:
            input_values: float [mixtures, samples].
            labels: the voices, float [mixtures, voices, samples], in any order.
        """
        samples, half = input_values.shape[-1], self.config.window // 2
        waves = input_values.to(next(self.parameters()).dtype)  # sound is float32, weights may be shorter
        wide = functional.pad(waves, (half, half + (-samples) % half))
        frames = functional.relu(self.encoder(wide[:, None]))
        masks = self.masks(frames).unflatten(1, (self.config.voices, self.config.filters))
        parts = self.decoder((masks * frames[:, None]).transpose(2, 3))  # [mixtures, voices, frames, window]
        first, second = parts[..., :half], parts[..., half:]
        made = functional.pad(first, (0, 0, 0, 1)) + functional.pad(second, (0, 0, 1, 0))
        found = made.flatten(2)[..., half : half + samples]
        loss = None if labels is None else -best_si_sdr(found.float(), labels.float()).mean()
        return Separated(loss=loss, logits=found)


def fourier_filters(filters: int, window: int) -> Tensor:
    """Cosines and sines at the middles of bins under a sine window, and the same with the other sign.

    Args:
        filters: how many, from the lowest frequency on; ``2 window`` and a step of half a window are a tight frame.
        window: samples.

    Returns:
        float32 [filters, window].
    """
    at = (torch.arange(window, dtype=torch.float64) + 0.5) / window
    bins = torch.arange(-(-filters // 4), dtype=torch.float64)[:, None] + 0.5
    turns = 2 * math.pi * bins * at
    rows = torch.stack([turns.cos(), turns.sin(), -turns.cos(), -turns.sin()], 1).flatten(0, 1)[:filters]
    return (rows * (math.pi * at).sin() * math.sqrt(2 / window)).float()


def si_sdr(found: Tensor, wanted: Tensor) -> Tensor:
    """Scale-invariant signal to distortion ratio in dB (Le Roux et al. 2019, arXiv:1811.02508), of means taken off.

    Args:
        found: [..., samples].
        wanted: the same; silence gives a large negative number.
    """
    found, wanted = (x - x.mean(-1, keepdim=True) for x in (found, wanted))
    part = (found * wanted).sum(-1, keepdim=True) / wanted.square().sum(-1, keepdim=True).clamp_min(1e-8)
    target = part * wanted
    left = (found - target).square().sum(-1)
    return 10 * torch.log10((target.square().sum(-1) + 1e-8) / (left + 1e-8))


def best_si_sdr(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over voices, in the order of voices that fits best: [mixtures] of [mixtures, voices, samples] each."""
    orders = list(permutations(range(found.shape[1])))
    return torch.stack([si_sdr(found[:, list(order)], wanted).mean(-1) for order in orders]).amax(0)


PART = Separator
