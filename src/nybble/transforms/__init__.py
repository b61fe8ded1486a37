"""Transforms: rewrite a block so that it computes the same in float and loses less when quantized. One method a file.

A transform reads what calibration saw of the channels between two weights and moves a factor from one to the other:
``norm / s`` before, ``weight * s`` behind (a norm fold), or rows of one linear layer by ``1 / s`` and columns of the
next by ``s`` (a linear fold). Which weights those are is the adapter's knowledge.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.core.registry import Registry
from nybble.models.adapter import LinearFold, NormFold

REGISTRY = Registry("nybble.transforms", "transform")


@dataclass(frozen=True, kw_only=True)
class Channel:
    """The channels between two weights, as a transform sees them.

    Attributes:
        fold: the pair, from the adapter.
        largest: largest magnitude that calibration saw in each channel, float32 [channels].
        before: rows of the weight that produce each channel, float32 [channels, columns]; None behind a norm.
        behind: weights that read the channels, float32 [rows, channels] each (of fused experts [experts, rows,
            channels]).
    """

    fold: NormFold | LinearFold
    largest: Tensor
    before: Tensor | None
    behind: Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class Transform(ABC):
    """A method; its fields are its options in a recipe."""

    @abstractmethod
    def takes(self, fold: NormFold | LinearFold) -> bool:
        """Whether it works on this kind of pair."""

    @abstractmethod
    def factor(self, channel: Channel) -> Tensor:
        """``s``, what the channels are divided by before and multiplied by behind; float32 [channels], positive."""


def make_transform(name: str, options: Mapping[str, Any]) -> Transform:
    """A transform from a recipe's step.

    Raises:
        UsageError: unknown transform. SchemeError: unknown option, or a value of the wrong type.
    """
    made: Transform = REGISTRY.make(name, options)
    return made


def safe_factor(factor: Tensor, alive: Tensor) -> Tensor:
    """``factor`` where channels are alive and it is a usable number, else 1 (dead channels move nothing)."""
    usable = alive & torch.isfinite(factor) & (factor > 0)
    return torch.where(usable, factor, torch.ones_like(factor)).clamp(1e-5, 1e5)


def rounded_to_pow2(factor: Tensor) -> Tensor:
    """The nearest power of two in the logarithm: such factors move through float weights without any rounding."""
    return torch.exp2(factor.log2().round())
