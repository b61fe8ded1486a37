"""Reconstruction: learned parts, moved by a gradient until a window of blocks gives what the float blocks gave.

There is one engine (:mod:`nybble.reconstruction.engine`); AdaRound, OmniQuant, CBQ, FlexRound, FP4DiT differ by which
parts are learned, the window, the loss and the schedule. A recipe's step names the loss, and the engine's options
beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.core.registry import Registry
from nybble.core.shapes import Bool, Float, Float32
from nybble.learned import ACTIVATIONS, WEIGHTS, Part, make_part, part_name
from nybble.learned._vectors import VectorPart
from nybble.learned.transforms import LearnedTransform
from nybble.nn.kinds import Target
from nybble.quantizer import Quantizer
from nybble.recipe import ROOMS

REGISTRY = Registry(*ROOMS["reconstruction"], lambda part: isinstance(part, type) and issubclass(part, Reconstruction))

FOLLOWS = make_part("ste", {"through": True})
"""Rounds, under a learned transform, what nothing else is learned of; the transform learns what ranges cost."""
FLOAT = "float"
"""A target: what the float blocks give for what the float network gives them."""
LOCAL = "local"
"""A target: what the float blocks give for what the quantized blocks before them give."""
_FASTEST = 1e6
"""The highest learning rate; steps of many more overflow float32, in torch's optimizers as in what is learned."""
FISHER = "fisher"
"""Beside the targets: squared gradients of the model's log likelihood by the float blocks' outputs."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction(ABC):
    """The engine's options; a loss adds its own.

    Attributes:
        weights, inputs: what is learned of a layer's weight, or of its input.
        block: a transform of all of a block's float weights that is learned, and folded into them at the end. At least
            one of the three is learned.
        norms, biases: whether the weights and biases of a block's normalisation layers, or the biases of its learned
            layers, learn too, in groups of these names. They stay what they are stored as.
        unit: what a window counts. ``block``: the model's blocks; of a model that is walked as one block, as
            convolutional networks are, its residual blocks, and the layers that are in none
            (:mod:`nybble.calibration.units`). ``layer``: each layer by itself. ``whole``: a model that is walked as one
            block is one window. Where such a model can't be cut, or ``block`` ties layers of all of it, it is whole.
        window: units that are optimised together. overlap: how many of them the next window has too; their parts go
            on from what they learned.
        steps: of the optimiser for each window; each takes one batch of calibration samples.
        rates: learning rate by the parts' groups (AdaRound: ``rounding``), and ``default`` for all others.
        schedule: of the rates: ``cosine`` and ``linear`` fall, ``constant`` stays. final: the share of a rate that a
            falling one ends at. warmup: the share of the steps over which rates first rise in a line.
        optimizer: ``adam``, ``adamw``, ``rmsprop`` (its mean of squares forgets a tenth a step), or ``sign``: steps of
            the rate against the sign of each gradient. decay: weight decay of adamw. max_norm: gradients longer than
            this, all parameters together, are shortened to it.
        feed: the path whose inputs the window gets; what it should give is always what the float network gives.
        mix: the share of these inputs that is drawn from the float path instead, anew at every step.
        mix_by: whether elements are drawn, or whole samples.
        penalty: weight of the parts' own penalties (a mean over elements), in units of the loss that the window has at
            the start: AdaRound's strength of 0.01 times 100 is one such loss where nothing is decided yet.
        precision: ``bfloat16`` computes the products of a float32 model's training steps in it, where the device can;
            what is learned, and what is judged, stays float32. ``model`` leaves them.
        rounds_inputs: whether layers round their inputs while their weights learn, as they will later; FP4DiT's don't.
        keep: the state that training ends with: the ``last``, or the ``best`` seen on the way.
        every: how often ``best`` looks: at the whole window's loss, as it would be stored, every so many steps; 0: at
            each step's own loss, over what that batch lost at the start.
        diverged: training ends early where a round over all batches lost more than this many times what the window
            lost at the start; 0: never. It goes back to its best state then: with ``keep=last`` that at the end of the
            round that lost least.
    """

    weights: Part | None = None
    inputs: Part | None = None
    block: LearnedTransform | None = None
    norms: bool = False
    biases: bool = False
    unit: Literal["block", "layer", "whole"] = "block"
    window: int = 1
    overlap: int = 0
    steps: int = 200
    rates: Mapping[str, float] = field(default_factory=dict)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final: float = 0.0
    warmup: float = 0.0
    optimizer: Literal["adam", "adamw", "rmsprop", "sign"] = "adam"
    decay: float = 0.0
    max_norm: float | None = None
    feed: Literal["float", "quantized"] = "quantized"
    mix: float = 0.0
    mix_by: Literal["element", "sample"] = "element"
    penalty: float = 100.0
    precision: Literal["model", "bfloat16"] = "model"
    rounds_inputs: bool = True
    keep: Literal["last", "best"] = "last"
    every: int = 0
    diverged: float = 100.0

    targets: ClassVar[tuple[str, ...]] = (FLOAT,)
    """What the loss compares with: :data:`FLOAT`, and of :data:`LOCAL` and :data:`FISHER` what it needs."""

    def __post_init__(self) -> None:
        if self.weights is None and self.inputs is None and self.block is None:
            raise SchemeError("a reconstruction learns nothing without a part: name one for weights, inputs or block.")
        self._check_transform()
        self._check_numbers()
        self._check_words()
        self._check_rates()

    def _check_transform(self) -> None:
        if self.block is not None and (self.norms or self.biases):
            raise SchemeError(
                f"block={LearnedTransform.registry.key_of(self.block)} folds what it learns into norms and biases; "
                "leave norms and biases out, or learn them in a step of their own behind it."
            )
        if self.block is not None and self.unit == "layer":
            raise SchemeError(
                f"block={LearnedTransform.registry.key_of(self.block)} ties layers of a block together, and unit=layer "
                "learns one at a time; take unit=block."
            )
        if self.block is not None and self.weights is not None and self.weights.fixes_x:
            raise SchemeError(
                f"{part_name(self.weights)} holds the weight that it began with, and block="
                f"{LearnedTransform.registry.key_of(self.block)} changes it in every step; name weights: clip, lsq "
                "or sign-round, or leave one of the two out."
            )

    def _check_numbers(self) -> None:
        if self.window < 1 or not 0 <= self.overlap < self.window:
            raise SchemeError(
                f"window={self.window}, overlap={self.overlap}: a window has at least one block, and at least one that "
                "the next does not have."
            )
        if self.steps < 1 or self.penalty < 0:
            raise SchemeError(f"steps={self.steps} must be 1 or more, penalty={self.penalty:g} 0 or more.")
        for name in ("final", "warmup", "mix"):
            if not 0 <= getattr(self, name) <= 1:
                raise SchemeError(f"{name} is a share, 0 to 1; got {getattr(self, name):g}.")
        for name in ("decay", "every", "diverged"):
            if getattr(self, name) < 0:
                raise SchemeError(f"{name} is 0 or more; got {getattr(self, name):g}.")
        if self.max_norm is not None and self.max_norm <= 0:
            raise SchemeError(f"max_norm={self.max_norm:g} would leave no gradient; give more than 0, or leave it out.")

    def _check_words(self) -> None:
        """Options that would do nothing, or nothing good, beside others."""
        if self.final and self.schedule == "constant":
            raise SchemeError(f"final={self.final:g} is where a rate falls to, and schedule=constant doesn't fall.")
        if self.decay and self.optimizer != "adamw":
            raise SchemeError(f"decay={self.decay:g} is for optimizer=adamw; {self.optimizer} has none.")
        if self.mix and self.feed == "float":
            raise SchemeError(f"mix={self.mix:g} mixes float inputs into quantized ones; it needs feed=quantized.")
        if self.every and self.keep != "best":
            raise SchemeError(f"every={self.every} is how often keep=best looks; add it, or leave every out.")
        if not self.rounds_inputs and self.inputs is not None:
            raise SchemeError(
                "rounds_inputs=false leaves inputs in float, and inputs are learned; leave one of them out."
            )
        if self.mix_by == "sample" and not self.mix:
            raise SchemeError("mix_by=sample says how float inputs are mixed in, and mix=0 mixes none; give mix.")
        if self.max_norm is not None and self.optimizer == "sign":
            raise SchemeError(
                f"max_norm={self.max_norm:g} shortens gradients, of which optimizer=sign takes the signs alone; leave "
                "max_norm out."
            )
        soft = [part_name(part) for part in (self.weights, self.inputs) if part is not None and part.soft]
        if self.keep == "best" and not self.every and soft:
            raise SchemeError(
                f"keep=best: {soft[0]} trains with weights between the values that are stored, so a step's own loss "
                "says little; give every=N to judge what would be stored."
            )

    def _check_rates(self) -> None:
        parts = (self.weights, self.inputs, self.block)
        groups = {group for part in parts if part for group in part.groups}
        if not groups:
            names = " and ".join(part_name(part) for part in (self.weights, self.inputs) if part)
            raise SchemeError(
                f"a reconstruction has nothing to learn with {names} alone: it has no parameters beside the weights, "
                "which stay; name adaround, clip or lsq."
            )
        known = {"default", *groups, *(name for name in ("norms", "biases") if getattr(self, name))}
        for group in self.rates:
            if group not in known:
                raise SchemeError(
                    f"rates: no learned part has the group {group!r}; there are {', '.join(sorted(known))}."
                )
            if not 0 <= self.rates[group] <= _FASTEST:
                raise SchemeError(
                    f"rates: {group} is {self.rates[group]:g}; a learning rate is 0 or more, and at most {_FASTEST:g}."
                )

    @abstractmethod
    def loss(
        self,
        output: Float[Tensor, " samples *rest"],
        wanted: Mapping[str, Float[Tensor, " samples *rest"]],
        mask: Bool[Tensor, "samples tokens"] | None,
    ) -> Float32[Tensor, ""]:
        """How far a window's output is from the float one; float32 scalar, differentiable.

        Args:
            output: [samples, ...] as the window gives it, in the model's dtype.
            wanted: by the names of :attr:`targets`, tensors of the same shape.
            mask: bool [samples, tokens], which rows are real; None where all are.
        """

    def learns(self, target: Target) -> bool:
        """Whether any part of a target is learned."""
        return target.kind.shares_input and (self._weight(target) is not None or self._input(target) is not None)

    @property
    def follower(self) -> Part | None:
        """What rounds a weight: the part that learns it; under a transform alone its quantizer, measured anew."""
        return FOLLOWS if self.weights is None and self.block is not None else self.weights

    def check(self, target: Target, quantizer_for: Any) -> None:
        """Raise SchemeError where a part can't be learned; ``quantizer_for`` gives what the solver rounds to."""
        weight, inputs = self._weight(target), self._input(target)
        if self.follower is not None and weight is not None and not isinstance(self.follower, VectorPart):
            self.follower.check(quantizer_for(weight), WEIGHTS)
        if self.inputs is not None and inputs is not None:
            self.inputs.check(inputs, ACTIVATIONS)

    def _weight(self, target: Target) -> Quantizer | None:
        return target.rule.weights if self.follower is not None else None

    def _input(self, target: Target) -> Quantizer | None:
        return target.rule.inputs if self.inputs is not None else None


def make_reconstruction(name: str, options: Mapping[str, Any]) -> Reconstruction:
    """A reconstruction from a recipe's step.

    Raises:
        UsageError: unknown loss. SchemeError: unknown option, or a value of the wrong type.
    """
    made: Reconstruction = REGISTRY.make(name, options)
    return made
