"""The main job: a float model becomes a quantized one, block after block.

    1. open the source; a skeleton of the model without weights
    2. match the scheme, check shapes, estimate memory, disk and time; refuse what can't fit
    3. calibration tokens -> hidden states before block 0 (if any step needs to see activations)
    4. for each block: load it, see its inputs, solve its weights, write the part, move the hidden states on
    5. what is outside the blocks; then one file, config, manifest; the folder appears

The hidden states follow the path that the solver asks for: ``float`` (what the float network computes) or ``quantized``
(what it computes with the blocks so far quantized). Memory holds one block and its activations. A killed run is resumed
at the first block that isn't done; finished blocks are only run again to move the hidden states on, on the quantized
path from the stored codes, so the bytes are the same.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from nybble.checkpoint.parts import Parts
from nybble.checkpoint.save import mark_quantized, model_config, save_side_files
from nybble.core.device import out_of_memory
from nybble.core.errors import FileError, NybbleError, UsageError
from nybble.core.files import AtomicFolder
from nybble.core.progress import Progress, Silent
from nybble.core.seeds import preserve_global_rng
from nybble.data import Samples
from nybble.models.sources.open import open_source
from nybble.nn.kv_model import use_quantized_cache
from nybble.recipe import Recipe, load_recipe
from nybble.report.record import LayerRow, Report
from nybble.walk.job import Job
from nybble.walk.settings import Settings
from nybble.walk.walk import Walk


def quantize(
    model: str | Path | nn.Module,
    recipe: str | Recipe,
    data: str | Samples = "builtin",
    *,
    out: str | Path | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> tuple[nn.Module | Path, Report]:
    """Quantize a model.

    Args:
        model: what :func:`~nybble.models.sources.open.open_source` takes, a transformers model in memory, or a plain
            torch network from images to logits; what is in memory is changed in place.
        recipe: a name, a YAML file, or a Recipe.
        data: a SRC, or tokens or sentences already cut.
        out: a folder to write; it appears whole or not at all. None keeps the result in memory.
        settings: sizes, device, seed.
        progress: told after each block.
        announce: gets the pre-flight lines.

    Returns:
        The quantized model, or with ``out`` its folder; and what was done.

    Raises:
        NybbleError: bad requests, files, data. Nothing is left behind, but for OUT.partial of a run that was killed,
            interrupted or stopped by a full disk: ``resume`` goes on from it.
    """
    settings = settings or Settings()
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    started = time.perf_counter()
    if out is not None and os.path.lexists(out):
        raise FileError(f"{out} exists already. Remove it or choose another output folder.")
    with preserve_global_rng(), torch.no_grad(), out_of_memory(settings.device):
        if isinstance(model, str | Path):
            source = open_source(str(model))
            job = Job.make(source.skeleton(settings.dtype), source, recipe, data, settings, kept=out is None)
        else:
            from nybble.models.network import as_model

            if out is not None:
                raise UsageError("a model in memory is quantized in memory; save it with nybble.save(model, folder).")
            job = Job.make(model if hasattr(model, "config") else as_model(model), None, recipe, data, settings)
        for line in job.preflight(out):
            (announce or _ignore)(line)
        if out is None:
            rows = Walk(job).run(None, progress or Silent())
            use_quantized_cache(job.model, job.plan.kv)
            mark_quantized(job.model)
            result = job.model if isinstance(model, str | Path) else model
            return result, Report(layers=tuple(rows), manifest=job.manifest(), seconds=time.perf_counter() - started)
        rows = _write(job, Path(out), progress or Silent(), announce or _ignore)
    return Path(out), Report(layers=tuple(rows), manifest=job.manifest(), seconds=time.perf_counter() - started)


def _write(job: Job, out: Path, progress: Progress, announce: Callable[[str], None]) -> list[LayerRow]:
    folder = AtomicFolder(out, resumable=True)
    try:
        with folder as partial:
            parts = Parts(partial, job.request(), job.settings.resume)
            if job.settings.resume:
                announce(parts.begun(job.part_names()))
            if not parts.assembled:
                Walk(job).run(parts, progress)
            if not parts.assembled:
                assert job.source is not None
                save_side_files(job.source, job.model, partial, images=job.adapter.reads == "images")
                config = model_config(job.model, job.settings.dtype)
                parts.assemble(job.part_names(), config, job.manifest(), job.plan.kv)
            return [LayerRow.from_dict(row) for row in parts.finish()]
    except NybbleError as error:
        # A bad request leaves nothing; what could go on once there is room (a full disk) or the same request stays.
        if not isinstance(error, FileError):
            shutil.rmtree(folder.partial, ignore_errors=True)
        raise


def _ignore(line: str) -> None:
    return None
