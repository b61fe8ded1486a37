"""The trainings of a run, one behind the other: each stage's model, its teacher, and what it leaves for the next."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nybble.core import ranks
from nybble.core.files import atomic_write_json
from nybble.core.progress import Progress
from nybble.core.seeds import generator
from nybble.nn.in_place import evaluation_mode
from nybble.pipelines.load import load_with_origin
from nybble.pipelines.training_job import Job
from nybble.report.trained import Start, start_of
from nybble.training.methods import AdapterMethod, Given, StagedMethod
from nybble.training.norms import measure_norms
from nybble.training.objective import Objective, make_losses
from nybble.training.state import load_state, save_state

CHECKPOINTS = "checkpoints"


def last_good(partial: Path) -> Path | None:
    """The newest thing of a run's folder that training can go on from; None where there is nothing."""
    whole = [
        *(partial / CHECKPOINTS).glob("checkpoint-*/trainer_state.json"),
        *(partial / CHECKPOINTS).glob("stage-*/checkpoints/checkpoint-*/trainer_state.json"),
    ]
    found = [path.parent for path in whole] + [*(partial / CHECKPOINTS).glob("stage-*.json")]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What all stages came to: the last one's model; updates (of each) and losses of all.

    ``losses``: by name, where several are added, in the updates of ``curve``. ``callbacks``: by name, what they say of
    these ``updates``, and of the last stage's ``layers``.
    """

    model: nn.Module
    trainable: int
    steps: list[int]
    curve: list[list[float]]
    losses: dict[str, list[float]]
    callbacks: dict[str, dict[str, Any]]
    memory: dict[str, int]


class Trainer:
    """Runs a job's stages.

    Args:
        job: checked. base: what to load. partial: the folder that the run works in. progress: told after each update.

    Attributes:
        start: where the last stage began, once it has.

    A stage before the last that is done leaves ``checkpoints/stage-N.safetensors`` and ``.json``: a run that is gone on
    with begins behind it.
    """

    def __init__(self, job: Job, base: str, partial: Path, progress: Progress) -> None:
        self.job, self.base, self.partial, self.progress = job, base, partial, progress
        self.staged = job.method if isinstance(job.method, StagedMethod) else None
        self.stages = 1 if self.staged is None else self.staged.stages(job.options)
        self.start = Start()

    # ------------------------------------------------------------------------------------------------------ measures
    def before(self) -> dict[str, Any] | None:
        """Of the base, or of the float model and of what it is rounded to before anything is trained."""
        job = self.job
        if job.judged is None:
            return None
        begun = self.measured(self._loaded() if job.method.packs else self._attached(self.stages - 1))
        teacher = None if job.method.packs and job.teacher is None else self._float(job.teacher or job.model)
        if teacher is None or begun is None:
            return begun
        exact = self.measured(teacher)
        return begun if exact is None else {**begun, "float": exact["metrics"]}

    def measured(self, model: nn.Module) -> dict[str, Any] | None:
        """Metrics and answers on what is held out."""
        job = self.job
        if job.judged is None:
            return None
        rows = job.judged.rows
        with evaluation_mode(model):
            metrics = job.task.measure(model, job.origin, rows, 8, self.progress)
            return {"metrics": metrics, "answers": job.task.samples(model, job.origin, rows)}

    # -------------------------------------------------------------------------------------------------------- models
    def _loaded(self) -> Any:
        """The model; float32 where it is to be prepared, in which its weights train."""
        job = self.job
        dtype = job.settings.dtype if job.method.packs else torch.float32
        loaded, _ = load_with_origin(self.base, dtype=dtype, device=job.settings.device, packed=job.asked.packed)
        return loaded.requires_grad_(False)

    def _attached(self, stage: int, after: nn.Module | None = None) -> nn.Module:
        """A stage's model at its start, with the float weights of ``after``."""
        job, loaded = self.job, self._loaded()
        if after is not None:
            assert self.staged is not None
            loaded.load_state_dict(self.staged.float_values(after), strict=False)
        given = Given(
            options=job.options, scheme=job.scheme, seed=job.settings.seed, start=job.asked.adapter, stage=stage,
            before=after, run=self._one_batch, known=job.known,
        )  # fmt: skip
        return job.method.attach(loaded, given)

    def _one_batch(self, model: Any) -> None:
        rows = self.job.examples.rows[: max(1, self.job.settings.batch)]
        device = next(model.parameters()).device
        model(**{name: t.to(device) for name, t in self.job.task.collate(rows).items()})

    def _some_batches(self, model: Any, count: int) -> None:
        """As many as are asked for, or all that there are, in an order of their own."""
        rows, size, device = self.job.examples.rows, self.job.settings.batch, next(model.parameters()).device
        order = torch.randperm(len(rows), generator=generator(self.job.settings.seed, "norms")).tolist()
        size = min(size, len(rows))
        for start in range(0, min(count * size, len(rows) - size + 1), size):
            batch = self.job.task.collate([rows[at] for at in order[start : start + size]])
            model(**{name: t.to(device) for name, t in batch.items()})

    def _behind(self, stage: int) -> nn.Module:
        """The model of a stage that is done."""
        model = self._attached(stage)
        load_state(model, self._at(stage, "safetensors"))
        return model

    def _at(self, stage: int, end: str) -> Path:
        return self.partial / CHECKPOINTS / f"stage-{stage}.{end}"

    def _teacher(self, stage: int) -> nn.Module | None:
        job = self.job
        if job.teacher is None:
            return None
        if stage and self.staged is not None and self.staged.taught_by_stage(job.options):
            found = self._behind(stage - 1)
        else:
            found = self._float(job.teacher)
        return found.requires_grad_(False).eval()

    def _float(self, model: str) -> nn.Module:
        """What is taken for the float model; of a packed one dense weights are held: every update asks for them."""
        found, _ = load_with_origin(model, dtype=self.job.settings.dtype, device=self.job.settings.device, dense=True)
        return found

    # ---------------------------------------------------------------------------------------------------------- runs
    def run(self, say: Callable[[str], None]) -> Ran:
        """Train all stages that aren't done."""
        done: list[dict[str, Any]] = []
        for stage in range(self.stages - 1):
            note = self._at(stage, "json")
            if ranks.lead_alone(lambda at=note: not at.exists()):  # type: ignore[misc]
                model, found = self._train(stage, say)
                with ranks.in_order():
                    if ranks.leads():
                        save_state(model, self._at(stage, "safetensors"))
                        atomic_write_json(note, found)
            done.append(json.loads(note.read_text(encoding="utf-8")))
        model, found = self._train(self.stages - 1, say)
        done.append(found)
        curve: list[list[float]] = []
        for each in done:
            behind = int(curve[-1][0]) if curve else 0
            curve += [[behind + step, loss] for step, loss in each["curve"]]
        losses = {name: [value for each in done for value in each["losses"][name]] for name in found["losses"]}
        return Ran(
            model=model, trainable=found["trainable"], steps=[each["steps"] for each in done], curve=curve,
            losses=losses, callbacks=_callbacks(done), memory=found["memory"],
        )  # fmt: skip

    def _train(self, stage: int, say: Callable[[str], None]) -> tuple[nn.Module, dict[str, Any]]:
        """One stage: its model, and what is to be said of it."""
        from nybble.training.loop import train  # the Trainer, which takes seconds

        job = self.job
        model = self._attached(stage, self._behind(stage - 1) if stage else None)
        if stage + 1 == self.stages and not isinstance(job.method, AdapterMethod):
            self.start = start_of(model)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        which = f"stage {stage + 1} of {self.stages}: " if self.stages > 1 else ""
        count, unit = len(job.examples.rows), job.task.unit
        part = "" if (coreset := job.method.coreset(job.options)) is None else f"{100 * coreset.fraction:g} % of "
        say(f"{which}{trainable:,} parameters train on {part}{count:,} examples of {job.examples.targets:,} {unit}")
        parts = dict(job.method.parts(model))
        folder = self.partial if stage + 1 == self.stages else self._at(stage, "run")
        folder.mkdir(parents=True, exist_ok=True)
        given = job.method.losses(job.options)
        teacher = self._teacher(stage)
        objective = Objective(job.task, make_losses(given), teacher if job.taught else None) if given else None
        acting = job.method.callbacks(model, job.options)
        with nullcontext() if objective is None else objective.served(model):
            run = train(
                model, job.examples.rows, job.settings, folder, self.progress, task=job.task, objective=objective,
                groups=job.method.groups(model, job.options, job.settings.lr), callbacks=acting,
                mixed=not job.method.packs, coreset=coreset, teacher=teacher,
            )  # fmt: skip
        if batches := job.method.norm_batches(job.options):
            measure_norms(model, lambda network: self._some_batches(network, batches))
        curve = [list(point) for point in run.curve]
        return model, {
            "steps": run.steps, "trainable": trainable, "curve": curve, "losses": run.losses,
            "callbacks": {
                name: {"updates": run.watched[name], "layers": each.layers()} for name, each in acting.items()
            },
            "memory": {**parts, **run.memory},
        }  # fmt: skip


def _callbacks(done: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of all stages: numbers of every update, and what the last one came to."""
    stages, found = [each["callbacks"] for each in done], {}
    for name, last in stages[-1].items():
        updates = {key: [value for each in stages for value in each[name]["updates"][key]] for key in last["updates"]}
        found[name] = {"updates": updates, "layers": last["layers"]}
    return found
