"""The main job: a float model becomes a quantized one, window after window of its blocks.

    1. open the source; a skeleton of the model without weights
       (a recipe that trains first: quantize in memory, train, go on with the float weights that this came to)
    2. match the scheme, make the recipe's steps, let each check what it gets and say what it needs and costs
    3. calibration samples -> the tensors in front of block 0, on every path that a step reads (if any looks at data)
    4. for each window: load the blocks that are new, transform and solve them; learn on the window; correct, write and
       release the blocks that leave it, and move the streams through them
    5. what is outside the blocks; (a recipe that trains last: the whole quantized model, which it learns on;) then one
       file, config, manifest; the folder appears

Paths are ``float`` (what the float network computes) and ``quantized`` (what it computes with the blocks so far
quantized). Memory holds one window and its activations. A killed run is resumed at the first window that isn't done;
finished blocks are only run again to move the streams on, so the bytes are the same.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import nn

from nybble.calibration.trace import Tensors
from nybble.checkpoint.marked import COMPRESSED
from nybble.checkpoint.parts import Parts, begun_with, cleared, holds_finished
from nybble.checkpoint.save import keep_record, mark_quantized, model_config, save_side_files
from nybble.core import ranks
from nybble.core.device import out_of_memory, require_memory
from nybble.core.errors import FileError, LearningError, ModelError, NybbleError, UsageError, did_you_mean
from nybble.core.explicit import explicit_settings
from nybble.core.files import AtomicFolder, check_new_folder
from nybble.core.progress import Progress, Silent
from nybble.core.seeds import preserve_global_rng
from nybble.data.given import Data
from nybble.models.sources import ModelSource
from nybble.models.sources.open import open_source
from nybble.nn.config import config_of
from nybble.nn.in_place import evaluation_mode, untouched, whole_or_not_at_all
from nybble.nn.kv_model import use_quantized_cache
from nybble.pipelines.constrain import check_steps, constrain
from nybble.pipelines.export import export_at_once
from nybble.pipelines.finished import (
    are_walked,
    finished,
    finished_parts,
    finishing_lines,
    teacher_of,
    without_spare,
)
from nybble.pipelines.form import writer
from nybble.pipelines.prepared import prepared, training_lines
from nybble.pipelines.request import Asked, Changes, build_recipe, read_recipe
from nybble.pipelines.targets import AUTO, check_form_name, meant
from nybble.recipe import Recipe
from nybble.report.record import LayerRow, Report
from nybble.walk.caches import with_scales
from nybble.walk.job import Job
from nybble.walk.settings import Settings
from nybble.walk.trial import known_inputs, try_out
from nybble.walk.walk import Walk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@explicit_settings()
def quantize(
    model: str | Path | nn.Module,
    recipe: Asked = "rtn",
    data: Data = "builtin",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    settings: Settings | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
    form: str = AUTO,
    **changes: Unpack[Changes],
) -> tuple[Any, Report]:
    """Quantize a model.

    Args:
        model: what :func:`~nybble.models.sources.open.open_source` takes, a transformers model in memory, or any
            torch module that is called with tensors. What is in memory is changed in place (but for a model that is a
            single layer: use what is returned), and as it was where the run fails or is interrupted. It runs in
            evaluation mode and gets back the modes that it had.
        recipe: a name, a YAML file, YAML's mapping, a Recipe, or a Scheme (rounded to nearest). Left out: ``rtn``,
            which takes any module, needs no data, and is done in seconds: a call that names a quantizer means that
            quantizer. The command line's is ``best``, which learns from calibration data for minutes; ``"best"`` here
            means it too, with ``target`` for another size.
        data: for calibration: a SRC; a list of texts; a tensor of the model's main input, samples in front; its inputs
            by name; a list of either of these, padded on the right where lengths differ; samples of :mod:`nybble.data`.
        tokenizer: for texts; a model that is not in memory brings its own.
        out: a folder to write; it appears whole or not at all. None keeps the result in memory, where a ``target``
            keeps the scheme to what it holds, and no file is written.
        settings: sizes, device, seed; or a mapping of them.
        progress: told after each block.
        announce: gets the pre-flight lines.
        form: of the files in ``out``: ``compressed-tensors``, which others load without nybble; ``native``, which holds
            everything; or ``auto``: the first where it says all of the result.
        changes: to the recipe's scheme, as the command line has them: ``weights``, ``activations``, ``scheme``, ``kv``,
            ``embeddings``, ``matmuls``, ``ignore``, ``effort`` (:func:`~nybble.pipelines.request.build_recipe`); and
            ``target``: what ``best`` is to come to, names of export targets that are to hold the result exactly; with
            ``out``, ``gguf:q4_k_m`` also writes ``out/gguf``, as ``exported`` of the report says.

    Returns:
        The quantized model, or with ``out`` its folder; and what was done.

    Raises:
        NybbleError: bad requests, files, data. Nothing is left behind, but for OUT.partial of a run that was killed,
            or that was interrupted or stopped by a full disk or a training that came to no number after a part of it
            was finished: ``resume`` goes on from it.
    """
    started = time.perf_counter()
    check_form_name(form)
    if out is None and form != AUTO:
        raise UsageError(
            f"form={form!r} is of files, and there is no out; nybble.save(model, folder, form=...) takes it."
        )
    made, settings, files = _asked(recipe, changes, settings, out)
    _check_given(model, tokenizer)
    held = {model: model.training} if isinstance(model, nn.Module) else {}
    with ExitStack() as stack:
        stack.enter_context(ranks.together())
        progress, announce = (progress, announce) if ranks.leads() else (None, None)
        stack.enter_context(preserve_global_rng())
        stack.enter_context(torch.no_grad())
        stack.enter_context(out_of_memory(str(settings.device or "cpu")))
        stack.enter_context(evaluation_mode(*held))
        for module in held:
            stack.enter_context(whole_or_not_at_all(module))
        job = _job(model, made, data, settings, out, tokenizer, files, form)
        exported = list[dict[str, Any]]()
        ranks.agreed(job.request())
        for line in _preflight_lines(job, out):
            (announce or _ignore)(line)
        given = known_inputs(job, data)
        if out is None:
            teacher = teacher_of(job)
            job = prepared(job, data, None, progress)
            rows = finished(job, teacher, data, _in_memory({"": job}, progress or Silent())[0][""], progress)
            job = with_scales(job, rows)
            job = _tried(job, given, announce or _ignore)
            _mark(job, rows)
            result = _result(job, model, held)
        else:
            job, rows = _write(job, data, given, Path(out), progress or Silent(), announce or _ignore, form)
            result = Path(out)
            exported = ranks.lead_says(export_at_once(result, files, announce) if ranks.leads() else [])
    return result, Report(
        layers=tuple(rows), manifest=job.manifest(), seconds=time.perf_counter() - started, times=job.times,
        exported=tuple(exported),
    )  # fmt: skip


def _result(job: Job, model: str | Path | nn.Module, held: Mapping[nn.Module, bool]) -> Any:
    """The finished model, without what it was wrapped in; of a single layer another module, in the mode it had."""
    result = job.model if isinstance(model, str | Path) or job.model is model else job.model.network
    if result not in held:
        nn.Module.train(result, any(held.values()))
    return result


@explicit_settings()
def preflight(
    model: str | Path | nn.Module,
    recipe: Asked = "rtn",
    data: Data = "builtin",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    settings: Settings | Mapping[str, Any] | None = None,
    form: str = AUTO,
    **changes: Unpack[Changes],
) -> list[str]:
    """What :func:`quantize` would do and need, in lines, after all its checks; nothing is quantized or written.

    Args and errors are those of :func:`quantize`.
    """
    check_form_name(form)
    made, settings, files = _asked(recipe, changes, settings, out)
    _check_given(model, tokenizer)
    with ExitStack() as stack:
        stack.enter_context(preserve_global_rng())
        stack.enter_context(torch.no_grad())
        if isinstance(model, nn.Module):
            stack.enter_context(untouched(model))
        job = _job(model, made, data, settings, out, tokenizer, files, form)
        return _preflight_lines(job, out)


def _preflight_lines(job: Job, out: str | Path | None) -> list[str]:
    """What is said before anything is made or cleared."""
    lines = [*job.preflight(out), *training_lines(job), *finishing_lines(job)]
    if out is not None and not job.settings.resume:
        partial = AtomicFolder(out, resumable=True).partial
        lines += [cleared(partial)] if holds_finished(partial) else []
    return lines


def _asked(
    recipe: Asked, changes: Changes, settings: Settings | Mapping[str, Any] | None, out: str | Path | None
) -> tuple[Recipe, Settings, tuple[str, ...]]:
    """What is meant by a request, after the checks that need no model; and the names of export targets."""
    found = Settings.of(settings)
    for name in changes:
        if name in (field.name for field in fields(Settings)):
            raise UsageError(f"{name!r} is one of the settings: settings={{{name!r}: ...}}.")
        if name not in Changes.__annotations__:
            raise UsageError(f"there is no argument {name!r}.{did_you_mean(name, Changes.__annotations__)}")
    made = build_recipe(recipe, **changes) if changes else read_recipe(recipe)
    if out is None and found.resume:
        raise UsageError("resume goes on from what a killed run left in its output folder; give out, or leave it out.")
    if out is not None:
        check_new_folder(out)
    return made, _as_begun(found, out), meant(recipe, changes).files


def _check_given(model: object, tokenizer: object) -> None:
    """Refuse modules that can't be changed or have nothing to change, and what makes no tokens."""
    if tokenizer is not None and not callable(tokenizer):
        raise UsageError(f"a tokenizer makes tokens of texts (transformers' do); got a {type(tokenizer).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("a TorchScript module can't be given other layers; quantize the module that it was made from.")
    if not isinstance(model, nn.Module):
        return
    first = next(iter(model.parameters()), None)
    if first is None:
        raise ModelError(f"a {type(model).__name__} without weights: there is nothing to quantize.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(
            f"the weights of this {type(model).__name__} are on the meta device, where they have no values; load them "
            "first, or give the folder that they are in."
        )


@explicit_settings()
def quantize_many(
    model: str | Path,
    recipes: Mapping[str, Asked],
    data: Data = "builtin",
    *,
    settings: Settings | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, tuple[Any, Report]]:
    """Quantize one model in several ways, in memory; bit for bit what :func:`quantize` gives each.

    Recipes that see the float network as it is go in one walk: inputs, their ranges and second moments are gathered
    once for all that ask for them. Others (whose hidden states or weights are their own) follow, each by itself.

    Args:
        model: what :func:`~nybble.models.sources.open.open_source` takes.
        recipes: by any name; each, data and settings as for :func:`quantize`.
        data: for calibration.
        settings: sizes, device, seed.
        progress: told after each block.

    Returns:
        For each recipe the model and the report; its seconds are the recipe's own, without what is shared.

    Raises:
        NybbleError: as :func:`quantize`.
    """
    if not isinstance(recipes, Mapping):
        raise UsageError(f"recipes are a mapping of any names to recipes; got a {type(recipes).__name__}.")
    if not recipes:
        raise UsageError("no recipe to quantize with.")
    settings = Settings.of(settings)
    jobs: dict[str, Job] = {}
    found: dict[str, tuple[Any, Report]] = {}
    with ranks.together(), preserve_global_rng(), torch.no_grad(), out_of_memory(str(settings.device or "cpu")):
        progress = progress if ranks.leads() else None
        for name, recipe in recipes.items():
            jobs[name] = _job(model, read_recipe(recipe), data, settings, None)
            data = jobs[name].tokens or data  # cut once
        ranks.agreed({name: job.request() for name, job in jobs.items()})
        together = {name: job for name, job in jobs.items() if job.shares}
        alone = [{name: job} for name, job in jobs.items() if not job.shares]
        for group in [*([together] if together else []), *alone]:
            _require_memory(group)
            given = {name: known_inputs(job, data) for name, job in group.items()}
            teachers = {name: teacher_of(job) for name, job in group.items()}
            group = {name: prepared(job, data, None, progress) for name, job in group.items()}
            rows, seconds = _in_memory(group, progress or Silent())
            for name, job in group.items():
                started = time.perf_counter()
                rows[name] = finished(job, teachers[name], data, rows[name], progress)
                seconds[name] += time.perf_counter() - started
                done = _tried(with_scales(job, rows[name]), given[name], _ignore)
                _mark(done, rows[name])
                report = Report(
                    layers=tuple(rows[name]), manifest=done.manifest(), seconds=seconds[name], times=done.times
                )
                found[name] = done.model, report
    return {name: found[name] for name in recipes}


def _job(
    model: str | Path | nn.Module,
    recipe: Recipe,
    data: Data,
    settings: Settings,
    out: str | Path | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    files: tuple[str, ...] = (),
    form: str = AUTO,
) -> Job:
    """Check everything that can be checked before anything heavy runs; ``files``: names of export targets."""
    if isinstance(model, str | Path):
        source = open_source(str(model))
        dtype = settings.place(None)[1]
        skeleton = source.skeleton(dtype)
        form = _form_begun(settings, out, form)
        check_steps(recipe, files, form)
        recipe = recipe.with_scheme(constrain(recipe.scheme, files, skeleton, dtype, form, partial(_tokenizer, source)))
        job = Job.make(skeleton, source, recipe, data, settings, kept=out is None, tokenizer=tokenizer)
        job.targets, job.kept_to = files, form if form == COMPRESSED else ""
        if out is not None:
            model_config(job.model, job.dtype)  # refuses a config that JSON can't hold
        return without_spare(job, _begun(settings, out))
    if not isinstance(model, nn.Module):
        raise UsageError(f"a model is a hub id, a path, or a torch module in memory; got a {type(model).__name__}.")
    if out is not None:
        raise UsageError("a model in memory is quantized in memory; save it with nybble.save(model, folder).")
    from nybble.models.network import as_model

    known = as_model(model) if config_of(model) is None else model
    check_steps(recipe, files)
    recipe = recipe.with_scheme(constrain(recipe.scheme, files, known, settings.place(known)[1]))
    job = Job.make(known, None, recipe, data, settings, tokenizer=tokenizer)
    job.targets = files
    return without_spare(job)


def _tokenizer(source: ModelSource) -> PreTrainedTokenizerBase | None:
    """Of a source; None where it has none."""
    try:
        return source.tokenizer()
    except NybbleError:
        if "tokenizer.json" in source.side_files():
            raise
        return None


def _as_begun(settings: Settings, out: str | Path | None) -> Settings:
    """A resumed run computes its products as the run before chose to, whatever a measurement says today."""
    if not settings.resume or out is None or settings.products is not None:
        return settings
    before = begun_with(AtomicFolder(Path(out), resumable=True).partial) or {}
    begun = before.get("settings", {}).get("products")
    if begun is None:
        return settings
    return replace(settings, products=torch.float32 if begun == "torch.float32" else settings.dtype or torch.bfloat16)


def _form_begun(settings: Settings, out: str | Path | None, form: str) -> str:
    """The form that the scheme keeps to: a resumed run's is the one that was asked for at first, whatever it is now."""
    before = _begun(settings, out)
    return form if before is None else str(before.get("kept_to", AUTO))


def _begun(settings: Settings, out: str | Path | None) -> dict[str, Any] | None:
    """The request of the run that this one goes on with, if any."""
    return begun_with(AtomicFolder(Path(out), resumable=True).partial) if settings.resume and out else None


def _in_memory(jobs: Mapping[str, Job], progress: Progress) -> tuple[dict[str, list[LayerRow]], dict[str, float]]:
    """Rows and seconds by job; hidden states that are to be spilled go to a folder for the time."""
    spilled = any(job.settings.spill for job in jobs.values())
    with tempfile.TemporaryDirectory(prefix="nybble-") if spilled else nullcontext() as folder:
        walk = Walk(jobs, None if folder is None else Path(folder))
        return walk.run(None, progress), walk.seconds


def _tried(job: Job, given: Sequence[Tensors], announce: Callable[[str], None], parts: Parts | None = None) -> Job:
    """The job, after a trial of what it made; with why there was none, or not to the end."""
    untried = try_out(job, given, parts)
    if untried:
        announce(untried)
    return replace(job, untried=untried)


def _mark(job: Job, rows: Sequence[LayerRow]) -> None:
    """Let a finished model use its KV cache, and say what it is, and how it was made, where it is saved."""
    use_quantized_cache(job.model, job.plan.kv)
    mark_quantized(job.model)
    keep_record(job.model, job.manifest() | {"layers": [row.to_dict() for row in rows]})


def _require_memory(jobs: Mapping[str, Job]) -> None:
    """Refuse recipes that don't fit together."""
    first, *others = jobs.values()
    more = sum(p.numel() * job.dtype.itemsize for job in others for p in job.model.parameters())
    require_memory(max(job.estimate.memory for job in jobs.values()) + more, first.device)


def _write(
    job: Job,
    data: Data,
    given: Sequence[Tensors],
    out: Path,
    progress: Progress,
    announce: Callable[[str], None],
    form: str,
) -> tuple[Job, list[LayerRow]]:
    folder, begun = AtomicFolder(out, resumable=True), False
    try:
        with folder if ranks.leads() else nullcontext(folder.partial) as partial, _worth_keeping(partial):
            with ranks.in_order():
                parts = Parts(partial, job.request(), job.settings.resume, writes=ranks.leads())
            if job.settings.resume:
                announce(parts.begun(job.part_names()))
            if ranks.leads():
                parts.check_form(form)
            begun = True
            if not ranks.lead_says(parts.assembled):
                job = _made(job, data, given, parts, progress, announce, form)
            rows = ranks.lead_says(parts.finish() if ranks.leads() else [])
        return job, [LayerRow.from_dict(row) for row in rows]
    except (FileError, LearningError) as error:
        if not begun or not holds_finished(folder.partial) or "--resume" in str(error):
            raise
        kept = f"What was finished before it stays in {folder.partial}; --resume goes on from there."
        raise type(error)(f"{error} {kept}") from error


@contextmanager
def _worth_keeping(partial: Path) -> Iterator[None]:
    """Remove what a run that fails inside leaves behind, unless another can go on from it.

    A bad request leaves nothing. What could go on once there is room (a full disk), or with the same request after an
    interruption, stays where a part is finished; so do hours of work before a window whose training failed.
    """
    try:
        yield
    except BaseException as error:
        refused = isinstance(error, NybbleError) and not isinstance(error, FileError | LearningError)
        if ranks.leads() and (refused or not holds_finished(partial)):
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _made(
    job: Job,
    data: Data,
    given: Sequence[Tensors],
    parts: Parts,
    progress: Progress,
    announce: Callable[[str], None],
    form: str,
) -> Job:
    """All files of the result in the parts' folder; the job as it is then."""
    assert job.source is not None
    # All that may fail at the end fails here, before hours of work.
    if ranks.leads() and (lacks := save_side_files(job.kind, job.source, job.model, parts.folder)):
        announce(lacks)
    teacher = teacher_of(job)
    if not ranks.lead_says(are_walked(job, parts)):
        job = prepared(job, data, parts, progress)
        Walk({"": job}, parts.folder if job.settings.spill else None).run(parts, progress)
    if ranks.leads():
        finished_parts(job, teacher, data, parts, progress)
        rows = (LayerRow.from_dict(row) for name in job.part_names() for row in parts.rows(name))
        job = _tried(with_scales(job, rows), given, announce, parts)
        config = model_config(job.model, job.dtype)  # with what quantizing changed: heads that are tied no more
        parts.assemble(job.part_names(), config, job.manifest(), job.plan.kv, writer(form, announce))
    return replace(job, untried=ranks.lead_says(job.untried))


def _ignore(line: str) -> None:
    return None
