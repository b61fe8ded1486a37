"""Reconstruction: learned parts, moved by a gradient until a window of blocks gives what the float blocks gave.

There is one engine (:mod:`nybble.reconstruction.engine`); AdaRound, OmniQuant, CBQ, FlexRound, FP4DiT differ by which
parts are learned, the window, the loss and the schedule. A recipe's step names the loss, and the engine's options
beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.core.registry import Registry
from nybble.core.shapes import Bool, Float, Float32
from nybble.learned import ACTIVATIONS, WEIGHTS, Part, part_name
from nybble.nn.kinds import Target
from nybble.quantizer import Quantizer
from nybble.recipe import ROOMS

REGISTRY = Registry(*ROOMS["reconstruction"], lambda part: isinstance(part, type) and issubclass(part, Reconstruction))


@dataclass(frozen=True, kw_only=True)
class Reconstruction(ABC):
    """The engine's options; a loss adds its own.

    Attributes:
        weights, inputs: what is learned of a layer's weight, or of its input; at least one of the two.
        window: blocks that are optimised together. overlap: how many of them the next window has too; their parts go
            on from what they learned.
        steps: of the optimiser for each window; each takes one batch of calibration samples.
        rates: learning rate by the parts' groups (AdaRound: ``rounding``), and ``default`` for all others.
        schedule: of the rates: ``cosine`` falls to zero, ``constant`` stays.
        feed: the path whose inputs the window gets; what it should give is always what the float network gives.
        penalty: weight of the parts' own penalties (a mean over elements), in units of the loss that the window has at
            the start: AdaRound's strength of 0.01 times 100 is one such loss where nothing is decided yet.
    """

    weights: Part | None = None
    inputs: Part | None = None
    window: int = 1
    overlap: int = 0
    steps: int = 200
    rates: Mapping[str, float] = field(default_factory=dict)
    schedule: Literal["cosine", "constant"] = "cosine"
    feed: Literal["float", "quantized"] = "quantized"
    penalty: float = 100.0

    def __post_init__(self) -> None:
        if self.weights is None and self.inputs is None:
            raise SchemeError("a reconstruction learns nothing without a part: name one for weights or inputs.")
        if self.window < 1 or not 0 <= self.overlap < self.window:
            raise SchemeError(
                f"window={self.window}, overlap={self.overlap}: a window has at least one block, and at least one that "
                "the next does not have."
            )
        if self.steps < 1 or self.penalty < 0:
            raise SchemeError(f"steps={self.steps} must be 1 or more, penalty={self.penalty:g} 0 or more.")
        groups = {group for part in (self.weights, self.inputs) if part for group in part.groups}
        if not groups:
            names = " and ".join(part_name(part) for part in (self.weights, self.inputs) if part)
            raise SchemeError(
                f"a reconstruction has nothing to learn with {names} alone: it has no parameters beside the weights, "
                "which stay; name adaround, clip or lsq."
            )
        known = {"default", *groups}
        for group in self.rates:
            if group not in known:
                raise SchemeError(
                    f"rates: no learned part has the group {group!r}; there are {', '.join(sorted(known))}."
                )
            if self.rates[group] < 0:
                raise SchemeError(f"rates: {group} is {self.rates[group]:g}; a learning rate is 0 or more.")

    @abstractmethod
    def loss(
        self,
        output: Float[Tensor, " samples *rest"],
        wanted: Float[Tensor, " samples *rest"],
        mask: Bool[Tensor, "samples tokens"] | None,
    ) -> Float32[Tensor, ""]:
        """How far a window's output is from the float one; float32 scalar, differentiable.

        Args:
            output: [samples, ...] as the window gives it, in the model's dtype.
            wanted: the same of the float blocks.
            mask: bool [samples, tokens], which rows are real; None where all are.
        """

    def learns(self, target: Target) -> bool:
        """Whether any part of a target is learned."""
        return target.kind.shares_input and (self._weight(target) is not None or self._input(target) is not None)

    def check(self, target: Target, quantizer_for: Any) -> None:
        """Raise SchemeError where a part can't be learned; ``quantizer_for`` gives what the solver rounds to."""
        weight, inputs = self._weight(target), self._input(target)
        if self.weights is not None and weight is not None:
            self.weights.check(quantizer_for(weight), WEIGHTS)
        if self.inputs is not None and inputs is not None:
            self.inputs.check(inputs, ACTIVATIONS)

    def _weight(self, target: Target) -> Quantizer | None:
        return target.rule.weights if self.weights is not None else None

    def _input(self, target: Target) -> Quantizer | None:
        return target.rule.inputs if self.inputs is not None else None


def make_reconstruction(name: str, options: Mapping[str, Any]) -> Reconstruction:
    """A reconstruction from a recipe's step.

    Raises:
        UsageError: unknown loss. SchemeError: unknown option, or a value of the wrong type.
    """
    made: Reconstruction = REGISTRY.make(name, options)
    return made
