"""A transform as a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from nybble.calibration.window import Window
from nybble.models.adapter import Adapter
from nybble.nn.kinds import Target
from nybble.transforms import Learnt, Rewrite, Transform
from nybble.walk.steps import BlockStep, Cost, Load, Subject


class TransformStep(BlockStep):
    """Rewrites a block's float weights when it enters the window.

    Args:
        key: the transform's. transform: the method. adapter: the model's.
        path: whose inputs it looks at.
        entry: what the report says of what it learned.
    """

    kind: ClassVar[str] = "transform"

    def __init__(
        self, key: str, transform: Transform, adapter: Adapter, path: str, entry: Mapping[str, Any] | None = None
    ) -> None:
        self.name, self.transform, self.adapter, self.path = f"transform {key!r}", transform, adapter, path
        self.key, self.moves_stream, self.entry = key, transform.moves_stream, entry
        self.rotates_inputs = transform.rotates_inputs

    def needs(self, subject: Subject) -> frozenset[str]:  # noqa: D102
        blocks = self.adapter.blocks_of(subject.model)
        works = any(self.transform.works_on(self.adapter, block, subject.model.config) for block in blocks)
        found = {"block inputs"} if works and self.transform.reads_inputs else set[str]()
        return frozenset(found | ({"whole network"} if works and self.transform.learns else set[str]()))

    def check(self, subject: Subject) -> None:  # noqa: D102
        self.transform.check(self.key, self.adapter, subject.model)
        targets = [target for block in subject.plan.blocks for target in block] + list(subject.plan.outside)
        self.transform.check_rules(list(dict.fromkeys(target.rule for target in targets)))

    def taught(self, found: Learnt) -> TransformStep:
        """The step with what its transform learned of the whole network."""
        return TransformStep(self.key, self.transform.taught(found.parameters), self.adapter, self.path, found.entry)

    def cost(self, subject: Subject, targets: Sequence[Target], load: Load) -> Cost:
        """Its rewritten weights are kept in float32; a pass over the inputs."""
        elements = sum(t.shape[0] * t.shape[1] * max(1, t.matrices) for t in targets)
        # float32 truths of what was rewritten; those in the source's precision are counted with the block
        held = max(0, 4 - load.source_bytes) * elements
        tokens = load.samples * load.seq_len
        flops = sum(self.transform.flops(*t.shape, tokens) * max(1, t.matrices) for t in targets)
        peak = self.transform.working_bytes([t.shape for t in targets if t.matrices])
        return Cost(held=held, peak=peak, flops=flops)

    def prepare(self, model: Any) -> None:  # noqa: D102
        self.transform.prepare(self.adapter, model)

    def outside(self, model: Any, seed: int) -> Sequence[Rewrite]:  # noqa: D102
        return list(self.transform.outside(self.adapter, model, seed))

    def outside_bytes(self, subject: Subject, load: Load) -> int:
        """A table as it is stored, and three times in float32: itself, with a norm's weights in it, rewritten."""
        if not self.moves_stream:
            return 0
        tables = [p.numel() for n, p in subject.model.named_parameters() if not subject.adapter.inside(n)]
        return (load.source_bytes + 12) * max(tables, default=0)

    def run(self, window: Window) -> None:  # noqa: D102
        if window.calibrated or not self.transform.reads_inputs:
            self.transform.run(window, self.adapter, self.path)
