"""What a recipe trains behind everything else: the quantized model, whole in memory, beside the float one.

Of a run that writes a folder, every part is written anew beside the old one; when all are there a mark says so, and
they take the old ones' places. A run that is killed before the mark trains again from the old parts, which are as they
were; after it, it goes on renaming: the bytes are the same.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from nybble.checkpoint.parts import Parts
from nybble.core import ranks
from nybble.core.errors import NybbleError
from nybble.core.products import products_in
from nybble.core.progress import Progress, Silent
from nybble.data.given import Data
from nybble.nn.experts import PackedExperts
from nybble.nn.in_place import evaluation_mode
from nybble.nn.kv_model import no_cache
from nybble.nn.layer import QuantLayer
from nybble.nn.packed import Packed
from nybble.pipelines.prepared import (
    batches_of,
    by_one,
    elements_of,
    require_training,
    samples_for,
    taking,
    targets_in,
)
from nybble.quantizer import Quantizer
from nybble.recipe import Step, trained
from nybble.report.record import LayerRow
from nybble.training.steps import MODEL, Finish, Finished, Inputs, Student, make_train_step
from nybble.walk.blocks import load_outside, release
from nybble.walk.job import OUTSIDE, Job
from nybble.walk.steps.make import make_finishes
from nybble.walk.trial import bring_back

Teacher = Callable[[], Callable[[Inputs], Any]]


def finishing_lines(job: Job) -> list[str]:
    """What is trained at the end, for people; raises where the memory can't hold it.

    Raises:
        UsageError, SchemeError: an unknown step or option, or one that comes first. DataError: not enough memory.
    """
    steps = make_finishes(job.recipe)
    if not steps:
        return list(job.spared)
    for step in steps:
        _check(job, step)
    needed = require_training(job, steps)
    said = ", ".join(step.name for step in trained(job.recipe)[1])
    line = f"after it, the whole quantized model is trained ({said}){by_one()}: about {needed / 1e9:.2f} GB of memory"
    return [*job.spared, line + taking(job, steps)]


def _check(job: Job, step: Finish) -> None:
    names = [*job.adapter.block_names(job.model), ""]
    targets = {
        f"{name}.{target.module}" if name else target.module: target.rule.weights
        for name, found in zip(names, [*job.plan.blocks, job.plan.outside], strict=True)
        for target in found
        if target.rule.weights is not None
    }
    layers = [job.model.get_submodule(name) for name in targets]
    known, own = job.tokens or job.taught, bool(getattr(step, "samples", 0))  # of its own: read when it begins
    count = None if known is None or own else len(next(iter(known.inputs.values())))
    step.check(job.model, layers, count, token_ids=job.tells_next)


def without_spare(job: Job, begun: Mapping[str, Any] | None = None) -> Job:
    """The job without those optional steps that can't be done or take too much here; ``spared`` says which, and why.

    Args:
        job: checked.
        begun: the request of a run that this one goes on with, which has decided.
    """
    kept, lines = list[Step](), list[str]()
    for step in job.recipe.steps:
        made = make_train_step(step.name, step.options) if step.kind == "train" else None
        reason = _spares(job, made, step, begun) if isinstance(made, Finish) and made.optional and not made.idle else ""
        if reason:
            lines.append(f"left out: train {step.name}, as {reason}")
        else:
            kept.append(step)
    if not lines:
        return job
    recipe = replace(job.recipe, steps=tuple(kept))
    return replace(
        job, recipe=recipe, spared=(*job.spared, *lines), taught=job.taught if make_finishes(recipe) else None
    )


def _spares(job: Job, made: Finish, step: Step, begun: Mapping[str, Any] | None) -> str:
    """Why an optional step is left out; empty where it isn't."""
    if begun is not None:
        return "" if step.to_dict() in begun["recipe"]["steps"] else "the run that this one goes on with left it out"

    def reason() -> str:
        if excess := made.excess(elements_of(job), job.dtype):
            return excess
        try:
            _check(job, made)
            require_training(job, [made])
        except NybbleError as error:
            return str(error).rstrip(".")
        return ""

    return ranks.lead_says(reason())


def tells_tokens(job: Job) -> bool:
    """Whether the model reads tokens, each of which tells the one before it."""
    return job.adapter.reads == "tokens"


def teacher_of(job: Job) -> Teacher:
    """What brings the float model, to be called after it was quantized; a model in memory is copied now."""
    kept = copy.deepcopy(job.model) if job.source is None and make_finishes(job.recipe) else None

    def teacher() -> Callable[[Inputs], Any]:
        model = kept
        if job.source is not None:
            model = job.source.model(job.dtype, job.device)
        assert model is not None

        @torch.no_grad()
        def output(inputs: Inputs) -> Any:
            with evaluation_mode(model):
                return model(**inputs, **no_cache(model))

        return output

    return teacher


def are_walked(job: Job, parts: Parts) -> bool:
    """Whether an earlier run wrote all parts, so that only what comes behind the walk is left; loads what it needs."""
    if not make_finishes(job.recipe) or not all(parts.done(name) for name in job.part_names()):
        return False
    load_outside(job)
    parts.fill(OUTSIDE, job.model, job.model, job.device)
    job.model.tie_weights()
    return True


def finished(
    job: Job, teacher: Teacher, data: Data, rows: Sequence[LayerRow], progress: Progress | None = None
) -> list[LayerRow]:
    """Train a job's quantized model, in memory, by what its recipe ends with; returns the rows with what it says.

    Of several processes the first one trains, and the others get what its model came to.
    """
    found = list(rows)
    for step in make_finishes(job.recipe):
        train = partial(_run, job, step, teacher, data, found, progress or Silent())
        found = _told(found, ranks.lead_makes(train, job.device))
        for tensor in job.model.state_dict().values():
            ranks.from_rank(tensor, 0)
    return found


def finished_parts(job: Job, teacher: Teacher, data: Data, parts: Parts, progress: Progress | None = None) -> None:
    """The same for a model whose parts are written."""
    for number, step in enumerate(make_finishes(job.recipe)):
        if not parts.marked(_stage(number)):
            _bring_all(job, parts)
            names = job.part_names()
            rows = [LayerRow.from_dict(row) for name in names for row in parts.rows(name)]
            told = {row.name: row for row in _told(rows, _run(job, step, teacher, data, rows, progress or Silent()))}
            for name, prefix in zip(names, [*job.adapter.block_names(job.model), ""], strict=True):
                own = [told[row["name"]].to_dict() for row in parts.rows(name)]
                inside = name != OUTSIDE
                module = job.model.get_submodule(prefix) if inside else job.model
                dotted = f"{prefix}." if inside and prefix else ""
                without = {} if inside else {"without": job.adapter.inside}
                parts.write(f"{name}.{_stage(number)}", dotted, module, own, **without)
            parts.took(MODEL, [*parts.times().get(MODEL, [])[:number], job.times[MODEL][-1]])
            parts.mark(_stage(number))
            _let_go(job)
        parts.take(job.part_names(), _stage(number))


def _stage(number: int) -> str:
    return f"finished-{number}"


def _bring_all(job: Job, parts: Parts) -> None:
    """The whole quantized model in memory."""
    bring_back(job, parts)
    parts.fill(OUTSIDE, job.model, job.model, job.device)
    job.model.tie_weights()


def _let_go(job: Job) -> None:
    if job.source is not None and not job.adapter.whole:
        for block in job.adapter.blocks_of(job.model):
            release(block)


def _run(
    job: Job, step: Finish, teacher: Teacher, data: Data, rows: Sequence[LayerRow], progress: Progress
) -> Finished:
    count, batch = batches_of(job, samples_for(job, step, data))
    student = Student(
        model=job.model, weights=_weights(job, rows), samples=count, batch=batch, teacher=teacher,
        blocks=[name for name in job.adapter.block_names(job.model) if name], seed=job.settings.seed,
        token_ids=tells_tokens(job),
    )  # fmt: skip
    started = time.perf_counter()
    with products_in(job.products), evaluation_mode(job.model):
        done = step.run(student, progress)
    job.times.setdefault(MODEL, []).append(time.perf_counter() - started)
    return done


def _weights(job: Job, rows: Sequence[LayerRow]) -> dict[str, list[Quantizer]]:
    """Modules that hold packed weights of layers and experts, with what these may be rounded with."""
    lines = {row.name: row.weights for row in rows}
    found: dict[str, list[Quantizer]] = {}
    for name, target, module in targets_in(job):
        asked = target.rule.weights
        if asked is None:
            continue
        usual = [job.solver.quantizer_for(asked), asked]
        if isinstance(module, QuantLayer) and isinstance(module.weight, Packed):
            found[f"{name}.weight"] = [*_parsed(lines.get(name)), *usual]
        elif isinstance(module, PackedExperts):
            for number in range(len(module.experts)):
                found[f"{name}.experts.{number}"] = [*_parsed(lines.get(f"{name}.{number}")), *usual]
    return found


def _parsed(line: str | None) -> list[Quantizer]:
    """The quantizer of a row's line, where it is one: a search may have chosen another than the scheme's."""
    try:
        return [Quantizer((line or "").partition(" + rank ")[0])]
    except NybbleError:  # what a tensor of another kind says of itself
        return []


def _told(rows: Sequence[LayerRow], done: Finished) -> list[LayerRow]:
    """The rows with what was done: of all that learned, and of the first one the curve."""
    found: list[LayerRow] = []
    entry = done.entry
    ratios = {_row_name(name): ratio for name, ratio in done.scales.items()}
    for row in rows:
        ratio = ratios.get(row.name)
        if ratio is None and (done.scales or found):
            found.append(row)
            continue
        learned = row.learned or {}
        text = (
            f"{entry['loss']}: {entry['before']:.3g} -> {entry['after']:.3g} on samples held back, on the whole model"
        )
        if entry["kept"] == "start":
            text += "; no step was better than the start, which was kept"
        elif ratio is not None:
            text += f"; values times {ratio[0]:g} .. {ratio[2]:g}, after error and picture were taken"
        windows = [*learned.get("windows", ()), entry]
        found.append(replace(row, notes=(*row.notes, text), learned={**learned, "windows": windows}))
        entry = {key: value for key, value in entry.items() if key != "curve"}
    return found


def _row_name(name: str) -> str:
    """Of the row about what a module holds: a layer's, or that of one of a fused weight's experts."""
    owner, _, leaf = name.rpartition(".")
    return owner if leaf == "weight" else f"{owner.removesuffix('.experts')}.{leaf}"
