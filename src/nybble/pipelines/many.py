"""Several recipes over one model in one walk: the float network runs once, and what is seen of a block serves all."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from nybble.checkpoint.save import mark_quantized
from nybble.core.device import out_of_memory, require_memory
from nybble.core.errors import SchemeError, UsageError
from nybble.core.progress import Progress, Silent, task
from nybble.core.seeds import preserve_global_rng
from nybble.data import Samples
from nybble.models.sources.open import open_source
from nybble.nn.kv_model import use_quantized_cache
from nybble.recipe import Recipe
from nybble.report.record import LayerRow, Report
from nybble.walk.job import Job
from nybble.walk.settings import Settings
from nybble.walk.walk import Walk


def quantize_many(
    model: str | Path,
    recipes: Mapping[str, Recipe],
    data: str | Samples = "builtin",
    *,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> dict[str, tuple[nn.Module, Report]]:
    """Quantize one model in several ways, in memory; bit for bit what :func:`nybble.quantize` gives each.

    Inputs, their ranges and second moments are gathered once for all recipes that ask for them.

    Args:
        model: what :func:`nybble.models.sources.open.open_source` takes.
        recipes: by any name. Their solvers follow the float network; transforms, which change it, are refused.
        data: as for :func:`nybble.quantize`.
        settings: the same.
        progress: told after each block.

    Returns:
        For each recipe the model and the report; its seconds are the recipe's own, without what is shared.

    Raises:
        SchemeError: a recipe that needs hidden states of its own. NybbleError: as :func:`nybble.quantize`.
    """
    if not recipes:
        raise UsageError("no recipe to quantize with.")
    settings = settings or Settings()
    with preserve_global_rng(), torch.no_grad(), out_of_memory(settings.device):
        walks = _walks(model, recipes, data, settings)
        rows: dict[str, list[LayerRow]] = {name: [] for name in walks}
        seconds = dict.fromkeys(walks, 0.0)
        lead = next(reversed(walks.values()))
        lead.leads, lead.finishes = True, any(walk.finishes for walk in walks.values())
        try:
            for walk in walks.values():
                walk.begin(None)
            with task(progress or Silent(), len(lead.job.plan.blocks), f"quantize ({len(walks)} recipes)") as bar:
                for index in range(len(lead.job.plan.blocks)):
                    lead.known = {}
                    for name, walk in walks.items():  # the lead, which moves on, comes last
                        if walk is not lead:
                            walk.stream, walk.calls, walk.known = lead.stream, lead.calls, lead.known
                        started = time.perf_counter()
                        rows[name] += walk.block(index, None)
                        seconds[name] += time.perf_counter() - started
                    bar.advance(note=f"block {index}")
            for name, walk in walks.items():
                walk.stream = lead.stream
                rows[name] += walk.outside(None)
        finally:
            if lead.stream is not None:
                lead.stream.close()
    found = {}
    for name in recipes:
        walk = walks[name]
        use_quantized_cache(walk.job.model, walk.job.plan.kv)
        mark_quantized(walk.job.model)
        report = Report(layers=tuple(rows[name]), manifest=walk.job.manifest(), seconds=seconds[name])
        found[name] = (walk.job.model, report)
    return found


def _walks(
    model: str | Path, recipes: Mapping[str, Recipe], data: str | Samples, settings: Settings
) -> dict[str, Walk]:
    """One walk a recipe, all over the same calibration samples; raises where they can't go together or don't fit."""
    source = open_source(str(model))
    walks: dict[str, Walk] = {}
    for name, recipe in recipes.items():
        job = Job.make(source.skeleton(settings.dtype), source, recipe, data, settings)
        if job.solver.path != "float" or job.transforms or job.adapter.convolutional or len(job.adapter.stacks) > 1:
            raise SchemeError(
                f"{name} (recipe {recipe.name}) can't share a walk: its hidden states or weights are its own. "
                "Quantize with it alone."
            )
        data = data if job.tokens is None else job.tokens
        walks[name] = Walk(job, leads=False)
    if any(walk.job.tokens is not None for walk in walks.values()):
        # A recipe that looks at nothing would not move the hidden states on.
        last = max(walks, key=lambda name: walks[name].job.tokens is not None)
        walks[last] = walks.pop(last)
    require_memory(
        max(walk.job.estimate.memory for walk in walks.values())
        + sum(parameter.numel() for walk in list(walks.values())[1:] for parameter in walk.job.model.parameters())
        * settings.dtype.itemsize,
        next(iter(walks.values())).job.device,
    )
    return walks
