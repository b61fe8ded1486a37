"""One run before it starts: what is to be done to which model, whether it can be done, and what it will need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nybble.calibration.chain import chain_fault
from nybble.calibration.synthesis import is_synthetic
from nybble.core import ranks
from nybble.core.device import measure_flops, require_memory
from nybble.core.errors import DataError, SchemeError, within
from nybble.core.files import need_space
from nybble.core.memory import resident_memory
from nybble.core.versions import versions
from nybble.data import InMemory, Origin, Samples
from nybble.data.given import Data, samples_of
from nybble.data.kinds import DataKind, data_kind
from nybble.models.adapter import Adapter, adapter_for, under, whole_adapter
from nybble.models.sources import called
from nybble.nn.kinds import Target, apart_line
from nybble.nn.rotation import mark_rotated
from nybble.recipe import Recipe
from nybble.scheme import in_short
from nybble.solvers import Solver
from nybble.walk.estimate import Estimate, estimate, with_layers
from nybble.walk.fitting import fitting
from nybble.walk.giving_way import giving_way
from nybble.walk.plan import Plan, make_plan
from nybble.walk.sampled import sampled
from nybble.walk.settings import DEFAULT_SAMPLES, Settings
from nybble.walk.steps import BlockStep, Load, Subject
from nybble.walk.steps.make import make_finishes, make_steps
from nybble.walk.steps.reconstruction import ReconstructionStep
from nybble.walk.steps.solver import SolverStep
from nybble.walk.steps.transform import TransformStep
from nybble.walk.synthesised import synthesised

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nybble.models.sources import ModelSource

OUTSIDE = "outside"


@dataclass
class Job:
    """One run: the model, and what is to be done to it.

    Attributes:
        adapter: found before any layer is quantized: looking at the model finds float layers only.
        steps: of the recipe, in order. paths: streams that they read. needs: what calibration must show.
        device, dtype: of forwards. products: what products are computed in on a CPU.
        tokens: what is calibrated on; None where no step of the walk looks at data. taught: what a training behind it
            learns from; None where there is none.
        times: seconds of what was learned, by the window's name, in order.
        load: the sizes that the estimate is of.
        spared: lines about what gave way to the model: optional steps that are left out, inputs of convolutions.
        outside_sees: whether what is in no block wants its inputs.
        targets: who is to load what will be exported; the scheme keeps to what they hold.
        kept_to: the form of files that it keeps to as well; empty for none.
    """

    model: Any
    adapter: Adapter
    source: ModelSource | None
    recipe: Recipe
    steps: tuple[BlockStep, ...]
    paths: frozenset[str]
    needs: frozenset[str]
    plan: Plan
    settings: Settings
    device: torch.device
    dtype: torch.dtype
    products: torch.dtype
    tokens: Samples | None
    estimate: Estimate
    load: Load
    outside_sees: bool
    untried: str = ""
    left_out: tuple[str, ...] = ()
    spared: tuple[str, ...] = ()
    taught: Samples | None = None
    times: dict[str, list[float]] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    kept_to: str = ""

    @staticmethod
    def make(
        model: PreTrainedModel | nn.Module,
        source: ModelSource | None,
        recipe: Recipe,
        data: Data,
        settings: Settings,
        kept: bool = True,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Job:
        """Check the request against the model; nothing heavy runs. ``kept``: the result stays in memory."""
        device, dtype = settings.place(model if source is None else None)
        asked, adapter = recipe, adapter_for(model)
        recipe, given_way = giving_way(model, adapter, asked)
        subject, steps, paths = _planned(model, adapter, recipe)
        left_out: list[BlockStep] = []
        main, usual = getattr(model, "main_input_name", "input_ids"), isinstance(data, str) and data == "builtin"
        heard = usual and adapter.reads == "speech"
        if heard or (usual and not data_kind(adapter.reads).asks):
            left_out = [step for step in steps if step.needs(subject) and _spare(step, heard)]
            steps = tuple(step for step in steps if step not in left_out)
        needs = frozenset().union(*(step.needs(subject) for step in steps))
        moving = next((step.name for step in steps if step.moves_stream), "")
        if moving and "fisher" in needs:
            raise SchemeError(
                f"recipe {recipe.name}: loss=fisher weighs outputs by gradients of the network as it came, and behind "
                f"{moving} the blocks give others; use loss=output."
            )
        if moving and "guided" in needs:
            raise SchemeError(
                f"recipe {recipe.name}: guided weighs inputs by gradients by what layers gave in the network as it "
                f"came, and behind {moving} they give others; leave guided out."
            )
        tokens, finishes = None, make_finishes(recipe)
        if (needs or finishes) and heard:
            raise DataError(
                f"{type(model).__name__} reads {main}, and {data!r} is text; give a folder of WAV files (--data), or "
                f"in Python data={{{main!r}: tensor, ...}}."
            )
        if needs or finishes:
            kind = data_kind(adapter.reads)
            origin: Origin = InMemory(model.config, tokenizer) if source is None or tokenizer is not None else source
            if is_synthetic(data):
                made: Samples = synthesised(str(data), model, source, kind.example(model, origin), settings, device)
            elif kind.of_model and isinstance(data, str | Path):
                made = sampled(str(data), model, source, settings, device)
            else:
                made = samples_of(data, kind, origin, settings.wanted(), main)
            tokens = kind.fitted(made, model)
            kind.check(tokens, model)
            one = kind.batch(tokens.inputs, 0, 1, "cpu").inputs
            fault = None if adapter.whole or adapter.convolutional or not needs else chain_fault(model, adapter, one)
            if fault is not None:
                adapter = whole_adapter(model, str(fault).rstrip("."))
                recipe, given_way = giving_way(model, adapter, asked)
                subject, steps, paths = _planned(model, adapter, recipe)
        taught, tokens = tokens if finishes else None, tokens if needs else None
        for module_kind in subject.plan.kinds:
            module_kind.prepare(model)
        solver = next(step.solver for step in steps if isinstance(step, SolverStep))
        products = ranks.lead_says(settings.products_of(device, dtype))
        load = _load(subject, source, settings, dtype, tokens, kept, paths, steps)
        read = tokens or taught
        length = 0 if read is None else data_kind(subject.adapter.reads).size(read)[1]
        load = replace(load, wide=products != dtype, taught_len=length)
        cost = estimate(subject, steps, load, measure_flops(device, products))
        sees = any(_wants_inputs(target, solver) for target in subject.plan.outside)
        return Job(
            model, adapter, source, recipe, steps, paths if tokens is not None else frozenset(), needs, subject.plan,
            settings, device, dtype, products, tokens, cost, load, sees, left_out=tuple(step.name for step in left_out),
            spared=given_way, taught=taught,
        )  # fmt: skip

    @property
    def tells_next(self) -> bool:
        """Whether its tokens are its input, so that each is told by those before it."""
        return self.adapter.reads == "tokens" and getattr(self.model, "main_input_name", "input_ids") == "input_ids"

    @property
    def transforms(self) -> list[BlockStep]:
        """The steps before the solver."""
        return [step for step in self.steps if step.kind == "transform"]

    @property
    def solver_step(self) -> SolverStep:
        """The step that quantizes."""
        return next(step for step in self.steps if isinstance(step, SolverStep))

    @property
    def solver(self) -> Solver:
        """Its method."""
        return self.solver_step.solver

    @property
    def entering(self) -> list[BlockStep]:
        """What is done to a block when it comes into the window."""
        return [*self.transforms, self.solver_step]

    @property
    def reconstructions(self) -> list[ReconstructionStep]:
        """What is done to the whole window."""
        return [step for step in self.steps if isinstance(step, ReconstructionStep)]

    @property
    def corrections(self) -> list[BlockStep]:
        """What is done to a block when it leaves the window."""
        return [step for step in self.steps if step.kind == "correction"]

    @property
    def window(self) -> int:
        """Blocks that are worked on together."""
        return max(step.window for step in self.steps)

    @property
    def overlap(self) -> int:
        """How many of them the next window has too."""
        return max(step.overlap for step in self.steps)

    @property
    def shares(self) -> bool:
        """Whether its hidden states are the float network's own, so that other recipes may read the same."""
        moved = any(step.moves_stream or step.rotates_inputs for step in self.steps)
        if moved or any(step.kind == "train" for step in self.recipe.steps):
            return False
        plain = self.paths <= {"float"} and self.window == 1 and len(self.adapter.stacks) == 1
        return plain and not any("block inputs" in self.needs for _ in self.transforms)

    def outside_names(self) -> list[str]:
        """Modules in no block that want to see their inputs."""
        found = [t for t in self.plan.outside if _wants_inputs(t, self.solver)]
        return [target.head or target.module for target in found]

    @property
    def kind(self) -> DataKind:
        """What the model reads."""
        return data_kind(self.adapter.reads)

    def part_names(self) -> list[str]:
        """Names of all parts, in order."""
        return [part_name(i) for i in range(len(self.plan.blocks))] + [OUTSIDE]

    def preflight(self, out: str | Path | None) -> list[str]:
        """What will be done, in lines; raises if memory or disk can't hold it."""
        ignored = self.recipe.scheme.ignore
        taken = {pattern: count for pattern, count in self.plan.counts.items() if pattern not in ignored}
        counts = ", ".join(f"{pattern}: {count}" for pattern, count in in_short(taken).items())
        data = "no calibration"
        if self.tokens is not None:
            data = "calibration {} x {} tokens".format(*self.kind.size(self.tokens))
            if self.settings.samples is None and self.tokens.available < DEFAULT_SAMPLES:
                data += f" (all that {self.tokens.source} has)"
        size = f" at {self.estimate.bits:.2f} bits" if self.estimate.bits else ""
        lines = [
            f"{self.plan.targets} weights in {len(self.plan.blocks)} blocks{size} ({counts}); {data}",
            f"about {self.estimate.memory / 1e9:.2f} GB of memory{self._beside()}, {self.estimate.disk / 1e9:.2f} GB "
            f"of disk, {self.estimate.seconds:.0f} s on {self.device}",
        ]
        if self.plan.uneven:
            lines.append(f"columns that groups don't divide end in a shorter one: {_some(self.plan.uneven)}")
        left = [name for name in self.plan.ignored if name != "lm_head"]
        if left and len(left) <= 8:
            lines.append(f"left in float: {', '.join(left)}")
        if self.plan.apart:
            lines.append(apart_line(self.plan.apart))
        if self.plan.read:
            lines.append(f"left in float, as the model's code reads their weights itself: {_some(self.plan.read)}")
        if self.left_out:
            lines.append(f"left out, as no data is given: {', '.join(self.left_out)}")
        if self.adapter.whole:
            lines.append(f"all of the model is one block, and in memory at once: {self.adapter.whole}")
        if self.source is not None and self.source.note:
            lines.append(self.source.note)
        each = ranks.size_here() if self.device.type == "cpu" else 1
        more = f"Its {self.window} blocks at once take {self.estimate.window / 1e9:.1f} GB. " if self.window > 1 else ""
        require_memory(
            self.estimate.memory * each, self.device,
            lambda free: more + fitting(self.load, free // each, self._memory),
        )  # fmt: skip
        if out is not None:
            beside = {} if self.source is None else self.source.side_files()
            need_space(out, self.estimate.disk + sum(path.stat().st_size for path in beside.values()))
        return lines

    def _beside(self) -> str:
        """What the estimate leaves out: Python, torch, a model that is in memory already."""
        known = resident_memory() if self.device.type == "cpu" else 0
        return f" above the {known / 1e9:.2f} GB in use now" if known else ""

    def _memory(self, load: Load, narrow: bool) -> int:
        """What a run of other sizes would take; ``narrow``: with windows of one block."""
        steps, subject = list(self.steps), Subject(model=self.model, adapter=self.adapter, plan=self.plan)
        if narrow:
            load = replace(load, window=1)
            steps = [step.narrow() if isinstance(step, ReconstructionStep) else step for step in steps]
        return estimate(subject, steps, load, 1.0).memory

    def request(self) -> dict[str, Any]:
        """Everything that decides the bytes of the result."""
        read = self.tokens or self.taught
        return {
            "format_version": 1,
            "model": "" if self.source is None else self.source.fingerprint(),
            "recipe": self.recipe.to_dict(),
            "data": None if read is None else read.manifest(),
            "settings": {
                "seed": self.settings.seed,
                "batch": self.settings.batch,
                "device": self.device.type,
                "dtype": str(self.dtype),
                "products": str(self.products),
            },
            **({"left_in_float": dict(self.plan.apart)} if self.plan.apart else {}),
            **({"targets": list(self.targets)} if self.targets else {}),
            **({"kept_to": self.kept_to} if self.kept_to else {}),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }

    def manifest(self) -> dict[str, Any]:
        """What a file says of its origin: a name, and :meth:`request` without what differs between machines."""
        known = self.request()
        known.pop("threads")
        return {"name": self.name, **known, **({"untried": self.untried} if self.untried else {})}

    @property
    def name(self) -> str:
        """What people call the model; of one in memory that came from nowhere, its class."""
        spec = getattr(self.model.config, "name_or_path", "") if self.source is None else self.source.spec
        return called(spec) if spec else type(self.model).__name__


def _planned(
    model: nn.Module, adapter: Adapter, recipe: Recipe
) -> tuple[Subject, tuple[BlockStep, ...], frozenset[str]]:
    """What the recipe's steps, checked, are to do to the model as this adapter sees it; the paths that they read."""
    with within(f"recipe {recipe.name}"):
        steps, paths = make_steps(recipe, adapter)
        solver = next(step.solver for step in steps if isinstance(step, SolverStep))
        for module in model.modules():  # an earlier run's
            mark_rotated(module, None)
        for step in steps:
            step.prepare(model)
        subject = Subject(model=model, adapter=adapter, plan=make_plan(model, adapter, recipe.scheme, solver))
        for step in steps:
            step.check(subject)
    return subject, steps, paths


def _spare(step: BlockStep, folds: bool) -> bool:
    """Whether a recipe is worth running without a step; ``folds``: transforms too that only tidy up."""
    return step.kind == "correction" or (folds and isinstance(step, TransformStep) and not step.transform.required)


def _some(names: Sequence[str]) -> str:
    """A few names, and how many there are."""
    return ", ".join(names[:4]) + (f" ... ({len(names)} in all)" if len(names) > 4 else "")


def _wants_inputs(target: Target, solver: Solver) -> bool:
    """Whether a target in no block wants to see inputs: a layer's, or those of the head that reads a table."""
    if not (target.kind.shares_input or target.head):
        return False
    rule = target.rule
    if rule.inputs is not None and rule.inputs.static:
        return True
    return rule.weights is not None and bool(solver.needs(rule.inputs) & {"second_moment", "inputs"})


def _load(
    subject: Subject,
    source: ModelSource | None,
    settings: Settings,
    dtype: torch.dtype,
    tokens: Samples | None,
    kept: bool,
    paths: frozenset[str],
    steps: Sequence[BlockStep],
) -> Load:
    kind = data_kind(subject.adapter.reads)
    samples, seq_len = (0, 0) if tokens is None else kind.size(tokens)
    sample, products, inputs = 0, dict[str, int](), dict[str, int]()
    if tokens is not None and subject.adapter.convolutional:
        example = kind.probe(tokens.inputs, "meta")
        sample = next(iter(example.values())).numel()
        prefixes = [under(name) for name in subject.adapter.block_names(subject.model)]
        inside = zip(prefixes, subject.plan.blocks, strict=True)
        names = {f"{prefix}{t.name}": t.name for prefix, targets in inside for t in targets}
        products, inputs = with_layers(subject.model, names, example)
    return Load(
        samples=samples,
        seq_len=seq_len,
        batch=settings.batch,
        dtype=dtype,
        source_bytes=0 if source is None else max(t.dtype.itemsize for t in source.stored().values()),
        whole=source is not None and not source.streamable,
        kept=kept and source is not None,
        spilled=settings.spill,
        sample=sample,
        streams=max(1, len(paths)),
        window=max(step.window for step in steps),
        products=products,
        inputs=inputs,
    )


def part_name(index: int) -> str:
    """Of the part that holds a block."""
    return f"block-{index:04d}"
