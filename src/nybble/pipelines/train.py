"""``nybble train``: a recipe, a model and data; checkpoints, measures before and after, a page, all in one folder.

    OUT               the packed model, of a recipe that trains one
    OUT/base          the packed base, where the run made it, and OUT/adapter_*: of a recipe that trains adapters
    OUT/merged        with ``merge``: both as one model
    OUT/training.json what was asked for and measured; OUT/report.html shows it
    OUT/layers.html   of a model: what came of its layers
    OUT/generated.jsonl the texts, where the model made its own
    OUT/logs          losses and rates for TensorBoard, where that is installed
    OUT/times.json    seconds: the one file (with the logs) that two runs of a request don't have alike

Until all is there it is OUT.partial, with ``checkpoints`` in it: a killed run goes on from the last one that is whole,
and comes to the same weights. Several processes (:mod:`nybble.core.ranks`) share the forwards of each update and come
to them, too; the first one writes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from nybble.checkpoint.parts import REQUEST, TIMES, begun_with, cleared, same_request
from nybble.checkpoint.trained import BASE, GENERATED, MERGED, TRAINING
from nybble.core import ranks
from nybble.core.device import out_of_memory
from nybble.core.errors import FileError, LearningError, NybbleError, UsageError
from nybble.core.explicit import explicit_settings
from nybble.core.files import AtomicFolder, atomic_write_json, need_space, new_folder
from nybble.core.progress import Progress, Silent
from nybble.core.seeds import preserve_global_rng
from nybble.data.samples import Origin
from nybble.models.sources.side_files import copy_side_files, is_tokenizer_file
from nybble.pipelines.dataset import generate_dataset, left_over
from nybble.pipelines.quantize import quantize
from nybble.pipelines.report import write_report
from nybble.pipelines.save import save
from nybble.pipelines.stages import CHECKPOINTS, Ran, Trainer, last_good
from nybble.pipelines.targets import AUTO
from nybble.pipelines.training_job import Asked, Job, checked, space
from nybble.report.trained import facts_of, trained_rows
from nybble.training.methods import AdapterMethod, Place
from nybble.training.recipe import TrainingRecipe, load_training_recipe
from nybble.training.settings import TrainSettings
from nybble.training.sharing import check_shares
from nybble.training.tasks import TASKS

BEFORE, MEMORY = "before.json", "memory.json"
MODEL = "model"


@explicit_settings()
def train(
    recipe: str | TrainingRecipe,
    model: str | Path,
    out: str | Path,
    data: str | None = None,
    *,
    scheme: Any = None,
    weights: str | None = None,
    activations: str | None = None,
    kv: str | None = None,
    packed: bool = False,
    options: Mapping[str, Any] | None = None,
    adapter: str | Path | None = None,
    judged_on: str | None = None,
    teacher: str | None = None,
    merge: bool = False,
    form: str = AUTO,
    settings: TrainSettings | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train a model in few bits.

    Args:
        recipe: a training recipe by name, its YAML file, or one that was read.
        model: a float model; of a recipe that trains beside a packed base also a folder that holds one.
        out: the folder to write; it appears whole or not at all.
        data: training examples of what the model does (:mod:`nybble.training.tasks`), or ``self:COUNT``, texts that the
            model makes itself (:mod:`nybble.training.generated`); None: the recipe's own.
        scheme: in place of the recipe's: a preset's name, a YAML file, a mapping, or a Scheme.
        weights: the quantizer line of all its rules' weights; of a packed base one of at most 8 bits.
        activations: of all its rules' inputs.
        kv: of the KV cache.
        packed: train on the blocks of a GGUF file as they are; otherwise its weights become floats, and are packed.
        options: of the recipe's method, over the recipe's own.
        adapter: an earlier result to go on from; ``model`` is the packed base that it was trained on.
        judged_on: held-out examples; measured before and after.
        teacher: the float network that losses compare with; None: ``model``.
        merge: also write the base and what was trained as one model.
        form: of the packed model's files, as :func:`nybble.quantize` takes it.
        settings: sizes, rates, device, seed, ``resume``; a mapping changes the recipe's.
        progress: told after each update.
        announce: gets lines of what is going on.

    Returns:
        What training.json says: ``method``, ``model`` ..., ``steps``, ``stages`` (updates of each), ``curve``,
        ``losses``, ``evaluation``, ``memory``; with ``out`` and ``seconds`` (of this call).

    Raises:
        NybbleError: bad requests, files, data; nothing is left behind, but for OUT.partial of a run that had begun to
            train: ``resume`` goes on from it.
    """
    started = time.perf_counter()
    with preserve_global_rng(), ranks.together():
        leads = ranks.leads()
        say, progress = (announce if leads else None) or _ignore, (progress if leads else None) or Silent()
        made = recipe if isinstance(recipe, TrainingRecipe) else load_training_recipe(recipe)
        chosen = settings if isinstance(settings, TrainSettings) else made.settings_with(settings or {})
        out = new_folder(out, model)
        asked = Asked(
            recipe=made, model=str(model), data=_data(made, data), packed=packed, options=options or {},
            changes={"scheme": scheme, "weights": weights, "activations": activations, "kv": kv},
            adapter=None if adapter is None else Path(adapter), judged_on=judged_on, teacher=teacher, merge=merge,
            form=form,
        )  # fmt: skip
        job = checked(asked, chosen)
        check_shares(chosen.accumulate, chosen.batch)
        ranks.agreed({"out": str(out), "judged_on": judged_on, "form": form, **job.request()})
        result, seconds = _run(job, out, started, progress, say)
    return {"out": str(out), **result, "seconds": seconds}


def _run(
    job: Job, out: Path, started: float, progress: Progress, say: Callable[[str], None]
) -> tuple[dict[str, Any], float]:
    """The result, and seconds; the first process writes, the others wait for it."""
    folder = AtomicFolder(out, resumable=True)
    with ExitStack() as stack:
        stack.enter_context(out_of_memory(job.settings.device))
        if ranks.leads():
            need_space(out, space(job))
        partial = stack.enter_context(folder if ranks.leads() else nullcontext(folder.partial))
        try:
            ranks.lead_alone(lambda: _begin(partial, job, say))
            result = ranks.lead_alone(lambda: _finished(partial))
            if result is None:
                job = _with_data(job, partial, progress, say)
                base = _base(job, partial, progress, say)
                result = _trained(job, base, partial, out, progress, say)
        except BaseException as error:
            if ranks.leads():
                _forget_unbegun(partial, error)
            if isinstance(error, LearningError) and (last := last_good(partial)) is not None:
                raise LearningError(f"{error} The last checkpoint before it stays in {last}.") from error
            raise
        seconds = ranks.lead_says(time.perf_counter() - started)
        ranks.lead_alone(lambda: _finish(partial, result, seconds))
    return result, seconds


def _data(recipe: TrainingRecipe, data: str | None) -> str:
    if data is None and not recipe.data:
        raise UsageError(f"recipe {recipe.name} trains on examples; give --data SRC.")
    return recipe.data if data is None else data


def _begin(partial: Path, job: Job, say: Callable[[str], None]) -> None:
    """Keep the request, or compare it with that of the run that is gone on with; any other is said, and cleared."""
    request = job.request()
    before = begun_with(partial) if job.settings.resume else None
    if before is not None:
        same_request(partial, before, request)
        return
    if not job.settings.resume and _made(partial):
        say(cleared(partial))
    for child in partial.iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()
    atomic_write_json(partial / REQUEST, request)


def _with_data(job: Job, partial: Path, progress: Progress, say: Callable[[str], None]) -> Job:
    """The job with its examples: where they are to be the model's own, they are made."""
    if job.own is None:
        return job
    made, device = partial / GENERATED, job.settings.device
    if ranks.lead_alone(lambda: left_over(made)):
        say(f"{job.own.count:,} texts of {job.model} are made")
        options = replace(job.own, batch=512 if device == "cuda" else 32)
        generate_dataset(
            job.model, made, options, dtype=job.settings.dtype, device=device, resume=True, progress=progress
        )  # fmt: skip
    return job.with_texts(made)


def _finished(partial: Path) -> dict[str, Any] | None:
    """The result of a run that was killed while it cleared up."""
    if not (partial / TRAINING).exists():
        return None
    found: dict[str, Any] = json.loads((partial / TRAINING).read_text(encoding="utf-8"))
    return found


def _forget_unbegun(partial: Path, error: BaseException) -> None:
    """Remove a folder in which nothing is worth going on from: a request that was refused, or nothing made yet."""
    refused = isinstance(error, NybbleError) and not isinstance(error, FileError | LearningError)
    if last_good(partial) is None and (refused or not _made(partial)):
        shutil.rmtree(partial, ignore_errors=True)


def _made(partial: Path) -> bool:
    """Whether there is something that took long."""
    names = (BASE, "base.partial", GENERATED, f"{GENERATED}.begun", TRAINING)
    return last_good(partial) is not None or any((partial / name).exists() for name in names)


def _base(job: Job, partial: Path, progress: Progress, say: Callable[[str], None]) -> str:
    """What to train on: the model itself, or what it is packed into."""
    if job.line is None:
        return job.model
    folder = partial / BASE
    if ranks.lead_alone(lambda: not folder.exists()):
        say(f"packing {job.model} in {job.line}")
        begun = {"resume": ranks.lead_alone(lambda: (partial / "base.partial").exists())}
        quantize(
            job.model, "rtn", out=folder, weights=job.line, form="native", progress=progress,
            settings={**begun, "seed": job.settings.seed, "dtype": job.settings.dtype, "device": job.settings.device},
        )  # fmt: skip
    return str(folder)


def _trained(
    job: Job, base: str, partial: Path, out: Path, progress: Progress, say: Callable[[str], None]
) -> dict[str, Any]:
    trainer = Trainer(job, base, partial, progress)
    before = ranks.lead_alone(lambda: _before(trainer, partial))
    run = trainer.run(say)
    return ranks.lead_alone(lambda: _written(trainer, run, before, out))


def _before(trainer: Trainer, partial: Path) -> dict[str, Any] | None:
    at = partial / BEFORE
    if not at.exists():
        atomic_write_json(at, trainer.before())
    found: dict[str, Any] | None = json.loads(at.read_text(encoding="utf-8"))
    return found


def _written(trainer: Trainer, run: Ran, before: dict[str, Any] | None, out: Path) -> dict[str, Any]:
    """What training.json says, once the result is on disk."""
    job, base, partial = trainer.job, trainer.base, trainer.partial
    place = Place(folder=partial, base=base if job.line is None else str(out / BASE), dtype=job.dtype)
    method = job.method
    facts = {} if isinstance(method, AdapterMethod) else facts_of(run.model, trainer.start)
    model = method.finished(run.model, place)
    after = trainer.measured(model)
    if isinstance(method, AdapterMethod):
        method.save(model, place)
        if job.asked.merge:
            shutil.rmtree(partial / MERGED, ignore_errors=True)
            merged: Any = method.merged(model)
            save(merged, partial / MERGED, job.tokenizer, form="native")
    else:
        _save_model(job, model, facts, partial)
        shutil.rmtree(partial / BASE, ignore_errors=True)
    request = job.request()
    sizes = {"examples": len(job.examples.rows), "targets": job.examples.targets}
    request["data"] = {**job.examples.manifest(), **request["data"], **sizes}
    return {
        **request, "steps": sum(run.steps), "stages": run.steps, "trainable": run.trainable, "curve": run.curve,
        "losses": run.losses, "callbacks": run.callbacks, "memory": run.memory,
        "evaluation": _compared(before, after), "merged": job.asked.merge,
        "task": {"name": TASKS.key_of(job.task), "unit": job.task.unit, "shown": job.task.shown},
    }  # fmt: skip


def _save_model(job: Job, model: Any, facts: Mapping[str, Any], partial: Path) -> None:
    """The packed model, with a record of its layers, beside what else the run leaves."""
    shutil.rmtree(partial / MODEL, ignore_errors=True)
    request = job.request()
    recipe = {**job.asked.recipe.to_dict(), "options": request.pop("options"), "scheme": request.pop("scheme")}
    rows = [row.to_dict() for row in trained_rows(model, facts)]
    manifest = {"name": f"{request.pop('method')} on {job.model}", "recipe": recipe, **request, "layers": rows}
    save(model, partial / MODEL, job.tokenizer, manifest, form=job.asked.form)
    _keep_beside(job.origin, partial / MODEL)
    for path in sorted((partial / MODEL).iterdir()):
        path.replace(partial / path.name)
    (partial / MODEL).rmdir()


def _keep_beside(origin: Origin, folder: Path) -> None:
    """Copy what stood beside the float weights and isn't written anew: how images are prepared, licences."""
    found = {name: path for name, path in origin.side_files().items() if not is_tokenizer_file(name)}
    copy_side_files({name: path for name, path in found.items() if not (folder / name).exists()}, folder)


def _compared(before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, Any] | None:
    """Metrics by model, and samples side by side."""
    if before is None or after is None:
        return None
    samples = [
        {"prompt": b["prompt"], "before": b["text"], "after": a["text"], "target": b["target"]}
        for b, a in zip(before["answers"], after["answers"], strict=True)
    ]
    models = {"before": before["metrics"], "after": after["metrics"]}
    if "float" in before:
        models = {"float": before["float"], **models}
    return {"models": models, "samples": samples}


def _finish(partial: Path, result: dict[str, Any], seconds: float) -> None:
    """What stays; the request is the last to go, so that a run killed here is gone on with."""
    atomic_write_json(partial / TRAINING, result)
    atomic_write_json(partial / TIMES, {"training": [seconds]})
    shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
    for name in (BEFORE, MEMORY):
        (partial / name).unlink(missing_ok=True)
    write_report(partial)
    (partial / REQUEST).unlink(missing_ok=True)


def _ignore(line: str) -> None:
    pass
