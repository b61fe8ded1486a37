"""A reconstruction as a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from nybble.calibration.window import Window
from nybble.core.errors import SchemeError, within
from nybble.learned import part_name
from nybble.learned._vectors import VectorPart
from nybble.learned.transforms import LearnedTransform
from nybble.models.adapter import under
from nybble.nn.kinds import Target, matrix_at
from nybble.reconstruction import FISHER, Reconstruction
from nybble.reconstruction.in_units import in_units, learn
from nybble.solvers import REGISTRY, Solver
from nybble.walk.steps import BlockStep, Cost, Load, Subject


class ReconstructionStep(BlockStep):
    """Learns on a whole window.

    Args:
        key: of the loss. reconstruction: the engine's options. solver: whose result it starts from.
    """

    kind: ClassVar[str] = "reconstruction"

    def __init__(self, key: str, reconstruction: Reconstruction, solver: Solver) -> None:
        self._key = key
        self.name, self.reconstruction, self.solver = f"reconstruction {key!r}", reconstruction, solver
        self.window, self.overlap = reconstruction.window, reconstruction.overlap
        self.paths = frozenset({"float", reconstruction.feed})

    def narrow(self) -> ReconstructionStep:
        """The same on windows of one block."""
        options = replace(self.reconstruction, window=1, overlap=0)
        return ReconstructionStep(self._key, options, self.solver)

    def needs(self, subject: Subject) -> frozenset[str]:  # noqa: D102
        return frozenset({"block inputs", *(("output gradients",) if self._weighed else ())})

    @property
    def _weighed(self) -> bool:
        return FISHER in self.reconstruction.targets

    def gradient_tokens(self, subject: Subject, load: Load) -> int:  # noqa: D102
        return load.tokens if self._weighed else 0

    def check(self, subject: Subject) -> None:  # noqa: D102
        options, adapter = self.reconstruction, subject.adapter
        if options.unit == "layer" and options.window > 1 and not (adapter.convolutional or adapter.whole):
            raise SchemeError(
                f"{self.name}: window={options.window} counts blocks in {type(subject.model).__name__}, and unit=layer "
                "learns one layer at a time; take window=1, or unit=block."
            )
        if options.unit == "whole" and options.window > 1 and (adapter.convolutional or adapter.whole):
            raise SchemeError(
                f"{self.name}: window={options.window} counts units, and unit=whole makes one of all of "
                f"{type(subject.model).__name__}; take window=1, or unit=block."
            )
        names = adapter.block_names(subject.model)
        learned = 0
        inputs = [t for targets in subject.plan.blocks for t in targets if t.rule.inputs is not None]
        for name, targets in zip(names, subject.plan.blocks, strict=True):
            for target in targets:
                if not self.reconstruction.learns(target):
                    continue
                learned += 1
                with within(f"{self.name}, {under(name)}{target.name}"):
                    self.reconstruction.check(target, self.solver.quantizer_for)
        if not learned:
            raise SchemeError(
                f"{self.name} finds nothing to learn: the scheme quantizes no layer inside the blocks of the sides "
                "(weights, inputs) that it names."
            )
        self._check_solver(subject)
        self._check_transform(subject)
        if self.reconstruction.inputs is not None and not inputs:
            raise SchemeError(f"{self.name} learns inputs, and the scheme rounds none; leave inputs out, or add them.")

    def _check_solver(self, subject: Subject) -> None:
        """What learns a weight needs codes and scales to begin with, or a code book of vectors.

        Inputs, and norms beside them, learn anyway.
        """
        options, book = self.reconstruction, self.solver.vectors
        weights = any(t.rule.weights and options.learns(t) for targets in subject.plan.blocks for t in targets)
        if options.follower is None or not weights:
            return
        part = part_name(options.weights) if options.weights else LearnedTransform.registry.key_of(options.block)
        solver = REGISTRY.key_of(self.solver)
        if isinstance(options.follower, VectorPart):
            if book is None:
                raise SchemeError(
                    f"{self.name}: {part} goes on from a code book of vectors, and solver {solver!r} leaves none; take "
                    "solver: k-means in front of it."
                )
            with within(self.name):
                options.follower.check_book(book)
        elif book is not None:
            raise SchemeError(
                f"{self.name}: {part} can't learn what solver {solver!r} leaves, code books of vectors; take solver: "
                "rtn or gptq in front of it, whose codes can be learned, or weights: vector-candidates."
            )

    def _check_transform(self, subject: Subject) -> None:
        """A transform alone must find something; beside a part it does where it can."""
        options, adapter, config = self.reconstruction, subject.adapter, subject.model.config
        if options.block is None:
            return
        found = False
        for block in adapter.blocks_of(subject.model):
            linear = adapter.linear_folds_of(block, config)
            heads = [fold for fold in linear if fold.heads]
            for fold in heads:
                channels = matrix_at(block, fold.second, block.get_parameter).shape[-1]
                options.block.check_heads(channels // int(config.num_attention_heads))
            others = [*adapter.norm_folds_of(block, config), *linear, *adapter.query_key_folds_of(block, config)]
            found |= bool(heads if options.block.inside_heads else others)
        if found or options.weights is not None or options.inputs is not None:
            return
        reasons = "; ".join(adapter.limits_of(config)) or "its adapter lists no such pair"
        raise SchemeError(
            f"{self.name} learns a transform alone, and finds no channels to rescale in this model: {reasons}. Name a "
            "part for weights or inputs (weights: clip)."
        )

    def cost(self, subject: Subject, targets: Sequence[Target], load: Load) -> Cost:
        """Float32 truth, two parameters an element with gradients and moments, a best state, activations twice."""
        elements = sum(t.shape[0] * t.shape[1] for t in targets if self.reconstruction.learns(t))
        width = sum(sum(t.shape) for t in targets)
        kept = load.samples * load.seq_len * max((t.shape[1] for t in targets), default=0) * load.dtype.itemsize
        gradients = kept * len(subject.plan.blocks) if self._weighed else 0
        if in_units(subject.adapter, self.reconstruction):  # with what goes into a unit, on each path
            most = max((load.inputs.get(t.name, t.shape[1] * load.seq_len) for t in targets), default=0)
            kept = (1 + len(self.paths)) * load.samples * most * load.dtype.itemsize
        kept = 0 if load.spilled else kept * len({*self.reconstruction.targets} - {FISHER}) + gradients
        running = load.tokens * width * (2 * load.dtype.itemsize + 8)
        passes = 3 * self.reconstruction.steps * load.tokens + 3 * load.samples * load.seq_len
        hop = self.window - self.overlap
        # with a transform every weight is rewritten in float32, with what its gradient needs
        rewritten = 0 if self.reconstruction.block is None else 16
        return Cost(
            learning=(4 + 2 * 16 + 4 + 8 + rewritten) * elements + running,
            peak=kept // max(1, self.window),
            flops=2.0 * passes * elements * self.window / hop,
        )

    def run(self, window: Window) -> None:  # noqa: D102
        learn(window, self.reconstruction)
