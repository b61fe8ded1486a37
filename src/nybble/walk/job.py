"""One run before it starts: what is to be done to which model, whether it can be done, and what it will need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nybble.core.device import measure_flops, require_memory
from nybble.core.errors import within
from nybble.core.files import need_space
from nybble.core.versions import versions
from nybble.data import InMemory, Origin, Samples, Wanted
from nybble.data.kinds import DataKind, data_kind
from nybble.models.adapter import Adapter, adapter_for
from nybble.recipe import Recipe
from nybble.solvers import Solver, make_solver
from nybble.transforms import Transform, make_transform
from nybble.transforms._apply import check_folds
from nybble.walk.estimate import Estimate, Load, estimate
from nybble.walk.plan import Plan, make_plan
from nybble.walk.settings import DEFAULT_SAMPLES, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nybble.models.sources import ModelSource

OUTSIDE = "outside"


@dataclass
class Job:
    """One run: the model, and what is to be done to it."""

    model: Any
    adapter: Adapter  # found before any layer is quantized: looking at the model finds float layers only
    source: ModelSource | None
    recipe: Recipe
    transforms: tuple[Transform, ...]
    solver: Solver
    plan: Plan
    settings: Settings
    tokens: Samples | None
    estimate: Estimate

    @staticmethod
    def make(
        model: PreTrainedModel | nn.Module,
        source: ModelSource | None,
        recipe: Recipe,
        data: str | Samples,
        settings: Settings,
        kept: bool = True,
    ) -> Job:
        """Check the request against the model; nothing heavy runs. ``kept``: the result stays in memory."""
        solver = make_solver(recipe.solver.name, recipe.solver.options)
        adapter = adapter_for(model)
        transforms = tuple(make_transform(step.name, step.options) for step in recipe.transforms)
        for step, transform in zip(recipe.transforms, transforms, strict=True):
            check_folds(step.name, transform, adapter, model)
        with within(f"recipe {recipe.name}"):
            plan = make_plan(model, adapter, recipe.scheme, solver)
        for kind in plan.kinds:
            kind.prepare(model)
        tokens = None
        # Images are of use to every convolutional network: its BatchNorms fold, its biases are corrected.
        if plan.needs(solver) or transforms or (adapter.convolutional and data != "builtin"):
            kind = data_kind(adapter.reads)
            tokens = _calibration(kind, source or InMemory(model.config), data, settings)
            kind.check(tokens, model)
        flops = measure_flops(torch.device(settings.device), settings.dtype)
        load = _load(source, settings, data_kind(adapter.reads), tokens, kept)
        cost = estimate(model, adapter, plan, solver, load, flops)
        return Job(model, adapter, source, recipe, transforms, solver, plan, settings, tokens, cost)

    @property
    def kind(self) -> DataKind:
        """What the model reads."""
        return data_kind(self.adapter.reads)

    @property
    def device(self) -> torch.device:
        """Where blocks run; a model in memory stays where it is."""
        if self.source is None:
            found: torch.device = next(iter(self.model.parameters())).device
            return found
        return torch.device(self.settings.device)

    def part_names(self) -> list[str]:
        """Names of all parts, in order."""
        return [part_name(i) for i in range(len(self.plan.blocks))] + [OUTSIDE]

    def preflight(self, out: str | Path | None) -> list[str]:
        """What will be done, in lines; raises if memory or disk can't hold it."""
        counts = ", ".join(f"{pattern}: {count}" for pattern, count in self.plan.counts.items())
        data = "no calibration"
        if self.tokens is not None:
            data = "calibration {} x {} tokens".format(*self.kind.size(self.tokens))
            if self.settings.samples is None and self.tokens.available < DEFAULT_SAMPLES:
                data += f" (all that {self.tokens.source} has)"
        lines = [
            f"{self.plan.targets} weights in {len(self.plan.blocks)} blocks ({counts}); {data}",
            f"about {self.estimate.memory / 1e9:.2f} GB of memory, {self.estimate.disk / 1e9:.2f} GB of disk, "
            f"{self.estimate.seconds:.0f} s on {self.settings.device}",
        ]
        left = [name for name in self.plan.ignored if name != "lm_head"]
        if left and len(left) <= 8:
            lines.append(f"left in float: {', '.join(left)}")
        if self.source is not None and self.source.note:
            lines.append(self.source.note)
        require_memory(self.estimate.memory, self.device)
        if out is not None:
            need_space(out, self.estimate.disk)
        return lines

    def request(self) -> dict[str, Any]:
        """Everything that decides the bytes of the result."""
        return {
            "format_version": 1,
            "model": "" if self.source is None else self.source.fingerprint(),
            "recipe": self.recipe.to_dict(),
            "data": None if self.tokens is None else self.tokens.manifest(),
            "settings": {
                "seed": self.settings.seed,
                "batch": self.settings.batch,
                "device": self.settings.device,
                "dtype": str(self.settings.dtype),
            },
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }

    def manifest(self) -> dict[str, Any]:
        """What a file says of its origin: :meth:`request`, without what differs between machines."""
        known = self.request()
        known.pop("threads")
        return known


def _load(source: ModelSource | None, settings: Settings, kind: DataKind, tokens: Samples | None, kept: bool) -> Load:
    samples, seq_len = (0, 0) if tokens is None else kind.size(tokens)
    return Load(
        samples=samples,
        seq_len=seq_len,
        batch=settings.batch,
        dtype=settings.dtype,
        source_bytes=0 if source is None else max(t.dtype.itemsize for t in source.stored().values()),
        whole=source is not None and not source.streamable,
        kept=kept and source is not None,
        spilled=settings.spill and not kept,
        example={} if tokens is None else kind.probe(tokens.inputs, "meta"),
    )


def _calibration(kind: DataKind, origin: Origin, data: str | Samples, settings: Settings) -> Samples:
    """Samples of the model's kind of data; those that the caller made as they are."""
    if not isinstance(data, str):
        return data
    wanted = Wanted(
        part="calibration",
        samples=settings.samples or DEFAULT_SAMPLES,
        seq_len=settings.seq_len,
        seed=settings.seed,
        fewer=settings.samples is None,
    )
    return kind.prepare(data, origin, wanted)


def part_name(index: int) -> str:
    """Of the part that holds a block."""
    return f"block-{index:04d}"
