"""Convolutional speech recognizers that spell by CTC: QuartzNet and Jasper, in any size.

Log-mel features go through blocks of convolution, BatchNorm and ReLU beside a residual path, then each frame tells a
character or the blank. QuartzNet (Kriman et al. 2019, arXiv:1910.10261) has depthwise convolutions with pointwise ones
behind them, Jasper (Li et al. 2019, arXiv:1904.03288) plain ones, and residuals from all blocks before. What is behind
the end of an utterance is set to zero before every convolution over time, so that padding changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

CHARACTERS = " abcdefghijklmnopqrstuvwxyz'"


class RecognizerConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Sizes; those of QuartzNet 15x5 are three times each width, 256 to 512, and kernels of 33 to 75 frames.

    Attributes:
        vocabulary: characters by class; the blank, ``pad_token_id``, is behind them.
        mels: bands of the features. rate: samples a second.
        widths, kernels: channels and frames of each block's convolutions. repeats: convolutions of a block.
        first: channels and kernel of the convolution before them, which halves the frames.
        last: channels, kernel and dilation of those behind them.
        separable: depthwise and pointwise in place of each convolution (QuartzNet).
        dense: residuals from the inputs of all blocks so far, not of this one alone (Jasper DR).
    """

    model_type = "nybble-recognizer"

    def __init__(
        self,
        vocabulary: str = CHARACTERS,
        mels: int = 64,
        rate: int = 16000,
        widths: Sequence[int] = (128, 128, 192),
        kernels: Sequence[int] = (11, 15, 19),
        repeats: int = 2,
        first: Sequence[int] = (128, 11),
        last: Sequence[Sequence[int]] = ((192, 23, 2), (256, 1, 1)),
        separable: bool = True,
        dense: bool = False,
        **more: Any,
    ) -> None:
        if len(widths) != len(kernels) or not all(kernel % 2 for kernel in kernels):
            raise ValueError(f"{len(widths)} widths and kernels {list(kernels)}: one odd kernel for each width.")
        self.vocabulary, self.mels, self.rate, self.repeats = vocabulary, mels, rate, repeats
        self.widths, self.kernels, self.first = list(widths), list(kernels), list(first)
        self.last, self.separable, self.dense = [list(each) for each in last], separable, dense
        more.setdefault("pad_token_id", len(vocabulary))
        super().__init__(**more)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How sound becomes features, where no ``preprocessor_config.json`` says it: NeMo's, windows of 20 ms."""
        return {
            "feature_extractor_type": "ParakeetFeatureExtractor", "feature_size": self.mels,
            "sampling_rate": self.rate, "hop_length": self.rate // 100, "win_length": self.rate // 50,
        }  # fmt: skip


@dataclass
class Spelled(ModelOutput):
    """``logits``: float [utterances, frames, classes], the blank last; ``loss``: CTC's, a character's, of labels."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class Conv(nn.Module):
    """A convolution over time, separable or not, and its BatchNorm."""

    def __init__(self, c: int, width: int, kernel: int, separable: bool, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.stride, pad = stride, dilation * (kernel - 1) // 2
        split = separable and kernel > 1
        self.depthwise = nn.Conv1d(c, c, kernel, stride, pad, dilation, groups=c, bias=False) if split else None
        plain = (1, 1, 0, 1) if split else (kernel, stride, pad, dilation)
        self.conv, self.norm = nn.Conv1d(c, width, *plain, bias=False), nn.BatchNorm1d(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[n, c, frames] -> [n, width, frames / stride]; ``mask`` [n, 1, frames] is 1 on what is of the utterance."""
        x = x * mask
        found: Tensor = self.norm(self.conv(x if self.depthwise is None else self.depthwise(x)))
        return found


class Block(nn.Module):
    """Convolutions with a ReLU between them; the residuals are added before the last ReLU."""

    def __init__(self, inputs: Sequence[int], width: int, kernel: int, repeats: int, separable: bool) -> None:
        super().__init__()
        sizes = [inputs[-1], *[width] * (repeats - 1)]
        self.convs = nn.ModuleList(Conv(c, width, kernel, separable) for c in sizes)
        self.residuals = nn.ModuleList(Conv(c, width, 1, False) for c in inputs)

    def forward(self, before: Sequence[Tensor], mask: Tensor) -> Tensor:
        """The last of ``before`` is this block's input; there are as many of them as residuals."""
        x = before[-1]
        for number, conv in enumerate(self.convs):
            x = conv(functional.relu(x) if number else x, mask)
        for residual, each in zip(self.residuals, before, strict=True):
            x = x + residual(each, mask)
        return functional.relu(x)


class Net(nn.Module):
    """From features to logits."""

    def __init__(self, c: RecognizerConfig) -> None:
        super().__init__()
        self.dense = c.dense
        wide, kernel = c.first
        self.first, sizes = Conv(c.mels, wide, kernel, c.separable, stride=2), [wide, *c.widths]
        self.blocks = nn.ModuleList(
            Block(sizes[: i + 1] if c.dense else sizes[i : i + 1], width, kernel, c.repeats, c.separable)
            for i, (width, kernel) in enumerate(zip(c.widths, c.kernels, strict=True))
        )
        behind = [sizes[-1], *(width for width, _, _ in c.last)]
        self.last = nn.ModuleList(
            Conv(into, width, kernel, c.separable, dilation=dilation)
            for into, (width, kernel, dilation) in zip(behind, c.last, strict=False)
        )
        self.classify = nn.Conv1d(behind[-1], len(c.vocabulary) + 1, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[n, frames, mels] -> [n, frames / 2, classes], ``mask`` [n, frames]."""
        mask = mask[:, None].to(x.dtype)
        seen = [functional.relu(self.first(x.transpose(1, 2), mask))]
        mask = mask[..., ::2]
        for block in self.blocks:
            seen.append(block(seen if self.dense else seen[-1:], mask))
        x = seen[-1]
        for conv in self.last:
            x = functional.relu(conv(x, mask))
        logits: Tensor = self.classify(x)
        return logits.transpose(1, 2)


class Recognizer(PreTrainedModel):  # type: ignore[no-untyped-call]
    """See the module."""

    config_class = RecognizerConfig
    main_input_name = "input_features"

    def __init__(self, config: RecognizerConfig) -> None:
        super().__init__(config)
        self.net = Net(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Weights begin as torch draws them."""

    def _get_subsampling_output_length(self, lengths: Tensor) -> Tensor:
        """How many frames of logits so many frames of features give; named as in transformers' Parakeet."""
        return torch.div(lengths + 1, 2, rounding_mode="floor")

    def forward(
        self, input_features: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Spelled:
        """Spell, and compare with labels where they are given.

        Args:
            input_features: float [utterances, frames, mels].
            attention_mask: int [utterances, frames], 1 on what is of an utterance; None where all is.
            labels: int64 [utterances, characters], negative behind an utterance's end.
        """
        n, frames, _ = input_features.shape
        mask = input_features.new_ones(n, frames) if attention_mask is None else attention_mask.to(input_features.dtype)
        logits = self.net(input_features, mask)
        loss = None if labels is None else self._loss(logits, mask.sum(1).long(), labels)
        return Spelled(loss=loss, logits=logits)

    def _loss(self, logits: Tensor, frames: Tensor, labels: Tensor) -> Tensor:
        """CTC's negative log likelihood over characters, of utterances' means (Graves et al. 2006)."""
        told = labels >= 0
        likely = functional.log_softmax(logits.float(), -1).transpose(0, 1)
        return functional.ctc_loss(
            likely, labels[told], self._get_subsampling_output_length(frames), told.sum(1),
            blank=self.config.pad_token_id, zero_infinity=True,
        )  # fmt: skip


PART = Recognizer
