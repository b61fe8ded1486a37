"""A correction as a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from nybble.calibration.window import Window
from nybble.core.errors import SchemeError, did_you_mean, within
from nybble.corrections import Correction
from nybble.corrections.bias import MOST
from nybble.models.adapter import under
from nybble.nn.kinds import Target, all_kinds
from nybble.scheme import matches
from nybble.walk.steps import BlockStep, Cost, Load, Subject


class CorrectionStep(BlockStep):
    """Corrects a block's quantized layers when it leaves the window.

    Args:
        key: the correction's. correction: the method. path: whose inputs it looks at.
    """

    kind: ClassVar[str] = "correction"

    def __init__(self, key: str, correction: Correction, path: str) -> None:
        self.name, self.correction, self.path = f"correction {key!r}", correction, path

    def _taken(self, targets: Sequence[Target], model: object, prefix: str) -> list[Target]:
        get = model.get_submodule  # type: ignore[attr-defined]
        return [
            t
            for t in targets
            if t.matrices and self.correction.takes(t, t.kind.class_names(get(f"{prefix}{t.module}")))
        ]

    def needs(self, subject: Subject) -> frozenset[str]:  # noqa: D102
        return frozenset({"block inputs"} if self.correction.reads_inputs and self._all(subject) else ())

    def _all(self, subject: Subject) -> list[Target]:
        names = subject.adapter.block_names(subject.model)
        pairs = zip(names, subject.plan.blocks, strict=True)
        return [t for name, targets in pairs for t in self._taken(targets, subject.model, under(name))]

    def check(self, subject: Subject) -> None:  # noqa: D102
        names = subject.adapter.block_names(subject.model)
        self._check_patterns(subject)
        for name, targets in zip(names, subject.plan.blocks, strict=True):
            for target in self._taken(targets, subject.model, under(name)):
                with within(f"{under(name)}{target.name}"):
                    self.correction.check(target)

    def _check_patterns(self, subject: Subject) -> None:
        """A pattern that matches no target is a mistake, but for the kinds' own names: ``Conv`` where there is none."""
        names = subject.adapter.block_names(subject.model)
        known = {word for kind in all_kinds() for word in kind.classes}
        seen: dict[str, tuple[str, ...]] = {}
        for name, targets in zip(names, subject.plan.blocks, strict=True):
            for target in targets:
                module = subject.model.get_submodule(f"{under(name)}{target.module}")
                seen[target.name] = target.kind.class_names(module)
        words = {*seen, *known, *(word for classes in seen.values() for word in classes)}
        for pattern in self.correction.targets:
            if pattern not in known and not any(matches(pattern, name, classes) for name, classes in seen.items()):
                raise SchemeError(
                    f"{self.name}: the target {pattern!r} matches nothing that is quantized in the blocks."
                    f"{did_you_mean(pattern, words)}"
                )

    def cost(self, subject: Subject, targets: Sequence[Target], load: Load) -> Cost:  # noqa: D102
        taken = [t for t in targets if t.matrices and self.correction.can_take(t)]
        peak = max((self.correction.working_bytes(*t.shape) for t in taken), default=0)
        if self.correction.reads_inputs and load.sample:
            at_once = max(load.batch, min(load.samples, MOST // max(1, load.sample)))
            peak = max(peak, 4 * load.dtype.itemsize * at_once * max(load.inputs.values(), default=0))
        return Cost(
            peak=peak,
            flops=sum(self.correction.flops(*t.shape) for t in taken),
            stored=sum(self.correction.stored_bytes(*t.shape) * t.matrices for t in taken),
        )

    def run(self, window: Window) -> None:  # noqa: D102
        state = window.block
        with state.on("float") as module:
            taken = self._taken(state.targets, module, "")
        if taken and (window.calibrated or not self.correction.reads_inputs):
            self.correction.run(window, taken, self.path)
