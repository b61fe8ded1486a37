"""The steps of a recipe as the walk runs them: what each needs to see, whether it can work, what it costs, and doing.

Four questions with four answers. A step never asks which other steps there are: the walk brings every block through all
of them in order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from nybble.calibration.window import Window
from nybble.models.adapter import Adapter
from nybble.nn.kinds import Target
from nybble.transforms import Rewrite
from nybble.walk.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a step is going to work on: a model without weights, its adapter, and what the scheme makes of it."""

    model: Any
    adapter: Adapter
    plan: Plan


@dataclass(frozen=True, kw_only=True)
class Load:
    """The sizes that decide the cost of a run.

    Attributes:
        samples, seq_len, batch: calibration; 0 samples if nothing is calibrated.
        taught_len: tokens of a sample that trainings of the whole model learn from; 0 where none does.
        dtype: of the forwards. source_bytes: bytes of a stored value; 0 for a model already in memory.
        whole: the source can only be read as a whole. kept: the result stays in memory. spilled: hidden states don't.
        sample: elements of one sample, of a convolutional network; else 0.
        streams: paths whose hidden states are kept. window: blocks that are loaded together.
        wide: products of a 16-bit dtype are computed in float32 (:mod:`nybble.core.products`).
        products, inputs: of a convolutional network, by layer: rows that its matrix is multiplied with, and elements
            of its input, for one sample.
    """

    samples: int
    seq_len: int
    batch: int
    dtype: torch.dtype
    source_bytes: int
    whole: bool = False
    kept: bool = False
    spilled: bool = False
    taught_len: int = 0
    sample: int = 0
    streams: int = 1
    window: int = 1
    wide: bool = False
    products: Mapping[str, int] = field(default_factory=dict)
    inputs: Mapping[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of one batch."""
        return min(self.batch, self.samples) * self.seq_len


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a step takes for one block.

    Attributes:
        held: bytes that stay while the block is worked on. learning: bytes that stay while this step works on it.
        peak: bytes while the step runs the block. alone: bytes at other times, when nothing is there of what a block
            has inside. flops: multiply-adds x 2.
        stored: bytes of quantized weights that it adds to the file.
    """

    held: int = 0
    learning: int = 0
    peak: int = 0
    alone: int = 0
    flops: float = 0.0
    stored: float = 0.0


class BlockStep(ABC):
    """One step.

    Attributes:
        name: kind and key, for messages: ``solver 'gptq'``.
        kind: transform, solver, reconstruction or correction.
        paths: streams whose inputs it must have: ``float``, ``quantized``; empty: any that there is.
        moves_stream: whether it changes what goes from block to block in the float network.
        rotates_inputs: whether layers are quantized behind a rotation of their inputs, which stays in the model.
        window, overlap: blocks that it works on at a time, and how many of them again with the next.
    """

    kind: ClassVar[str]
    name: str
    paths: frozenset[str] = frozenset()
    moves_stream: bool = False
    rotates_inputs: bool = False
    window: int = 1
    overlap: int = 0

    @abstractmethod
    def needs(self, subject: Subject) -> frozenset[str]:
        """What calibration must show for it; empty where it looks at weights alone."""

    def check(self, subject: Subject) -> None:  # noqa: B027  most have nothing to refuse
        """Raise SchemeError (or ModelError) where it can't work; the message says what could."""

    @abstractmethod
    def cost(self, subject: Subject, targets: Sequence[Target], load: Load) -> Cost:
        """What it takes for a block with these targets."""

    def prepare(self, model: Any) -> None:  # noqa: B027  most take a model as it is
        """Change a model's structure, before anything is planned; it may be without weights."""

    def outside(self, model: Any, seed: int) -> Sequence[Rewrite]:
        """How it rewrites what is in no block, before the first one is run."""
        return ()

    def outside_bytes(self, subject: Subject, load: Load) -> int:
        """Most memory that :meth:`outside`'s rewrites take."""
        return 0

    def gradient_tokens(self, subject: Subject, load: Load) -> int:
        """Of how many tokens it wants the gradients of all layers' outputs, from a pass of the whole model; or 0."""
        return 0

    @abstractmethod
    def run(self, window: Window) -> None:
        """Do it; transforms, solvers and corrections get a window of one block."""
