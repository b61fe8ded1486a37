"""Transforms: rewrite a block so that it computes the same in float and loses less when quantized. One method a file.

What a transform does to a block is a list of :class:`~nybble.calibration.matrices.Rewrite`: each a *function* of some
weights and of parameters (the factors, an order of channels, a rotation), so that the parameters can also be learned.
Which weights may be rewritten together is the adapter's knowledge; what calibration sees of the channels between them
is gathered when asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from nybble.calibration.lessons import Network
from nybble.calibration.matrices import Rewrite
from nybble.calibration.window import Window
from nybble.core.errors import ModelError
from nybble.core.registry import Registry
from nybble.models.adapter import Adapter
from nybble.recipe import ROOMS
from nybble.scheme import Rule

__all__ = ["REGISTRY", "Rewrite", "Transform", "make_transform"]

REGISTRY = Registry(*ROOMS["transform"], lambda part: isinstance(part, type) and issubclass(part, Transform))


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """What a transform learned of a whole network.

    Attributes:
        parameters: by name, on the CPU.
        entry: for the report, as of a window of a reconstruction (:class:`nybble.report.record.LayerRow`); None where
            it says nothing.
    """

    parameters: dict[str, Tensor]
    entry: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Transform(ABC):
    """A method; its fields are its options in a recipe.

    Attributes:
        reads_inputs: whether it looks at what calibration feeds a block.
        required: whether a model in which it finds nothing is an error, and not simply done.
        moves_stream: whether the hidden states between blocks are others afterwards, so that what is in no block is
            rewritten too.
        rotates_inputs: whether layers are quantized behind a rotation of their inputs, which stays in the model.
        learns: whether its parameters are learned, once for the whole model, before the first block is run.
        optional: leave the step out, with a line that says why, of a model in which it finds nothing.
    """

    optional: bool = False

    reads_inputs: ClassVar[bool] = True
    required: ClassVar[bool] = True
    moves_stream: ClassVar[bool] = False
    rotates_inputs: ClassVar[bool] = False
    learns: ClassVar[bool] = False

    @abstractmethod
    def rewrites(self, window: Window, adapter: Adapter, path: str) -> Iterable[Rewrite]:
        """What it does to a block.

        Args:
            window: one block, in float.
            adapter: the model's.
            path: on which its inputs are looked at.
        """

    @abstractmethod
    def works_on(self, adapter: Adapter, block: Any, config: Any) -> bool:
        """Whether it finds anything in a block (on the meta device) of a model with this config."""

    def working_bytes(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Most memory that it needs for a block of weights of these shapes, beside what it rewrites, in bytes."""
        return 0

    def flops(self, rows: int, columns: int, tokens: int) -> float:
        """Multiply-adds x 2 for a weight [rows, columns]: as far as it looks at inputs, a forward."""
        return 2.0 * tokens * rows * columns

    def prepare(self, adapter: Adapter, model: Any) -> None:  # noqa: B027  (most take a model as it is)
        """Change a model's structure before anything is planned; it may be without weights."""

    def outside(self, adapter: Adapter, model: Any, seed: int) -> Iterable[Rewrite]:
        """What it does to what is in no block (names from the model on); before the first block is run."""
        return ()

    def learning_bytes(self, elements: int, largest: int) -> int:
        """Most memory that learning takes beside activations, of a model and of its largest block (or table)."""
        return 0

    def learning_passes(self, samples: int) -> float:
        """How many forwards of one sample through the whole model learning costs, a backward counting as two; about."""
        return 0.0

    def learn(self, network: Network) -> Learnt:
        """What it learns of the whole float network; nothing where it is turned off.

        Raises:
            LearningError: a loss is no number.
        """
        return Learnt(parameters={}, entry=None)

    def taught(self, found: Mapping[str, Tensor]) -> Transform:
        """The same with the parameters that :meth:`learn` found."""
        return self

    def check_rules(self, rules: Sequence[Rule]) -> None:  # noqa: B027  (only what learns looks at a scheme)
        """Raise SchemeError where it can't learn for what a scheme rounds."""

    def limits(self, adapter: Adapter, config: Any) -> list[str]:
        """Why it may find nothing, for people."""
        return adapter.limits_of(config)

    def check(self, name: str, adapter: Adapter, model: Any) -> None:
        """Raise ModelError, with the adapter's reasons, where it finds nothing to work on in the whole model."""
        if not self.required or any(self.works_on(adapter, block, model.config) for block in adapter.blocks_of(model)):
            return
        reasons = "; ".join(self.limits(adapter, model.config)) or "its adapter lists no such pair"
        raise ModelError(
            f"transform {name!r} finds no pair of weights to work on in this model: {reasons}. Take a recipe without "
            "it; `nybble recipes NAME` prints one as YAML, to leave a step out."
        )

    def run(self, window: Window, adapter: Adapter, path: str) -> None:
        """Rewrite the block of a window in place; all is looked at before anything changes."""
        for rewrite in list(self.rewrites(window, adapter, path)):
            rewrite.apply(window.block)


def make_transform(name: str, options: Mapping[str, Any]) -> Transform:
    """A transform from a recipe's step.

    Raises:
        UsageError: unknown transform. SchemeError: unknown option, or a value of the wrong type.
    """
    made: Transform = REGISTRY.make(name, options)
    return made
