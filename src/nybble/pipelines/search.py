"""``nybble search MODEL OUT``: which format each layer gets, for a budget.

1. open the source; match what is searched, check the menu against every layer and the budget against the menu
2. load the model in float, run it once: what layers read, how often they multiply
3. measure what each layer loses in each format (every measurement is kept: a killed run goes on)
4. choose; compare with one format for all, with random choices of the same cost, and with the reversed order
5. scheme.yaml, search.json, search.html; the folder appears
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from nybble.core.device import out_of_memory
from nybble.core.dtypes import float_dtype
from nybble.core.errors import NybbleError, UsageError
from nybble.core.explicit import explicit_settings
from nybble.core.files import AtomicFolder, atomic_write_json, atomic_write_text, check_new_folder
from nybble.core.options import settings_of
from nybble.core.progress import Progress, Silent, task
from nybble.core.seeds import preserve_global_rng
from nybble.core.versions import versions
from nybble.costs import Sized, make_cost
from nybble.data.kinds import Batch, data_kind
from nybble.data.samples import Wanted
from nybble.data.text import check_source
from nybble.models.adapter import reads_of
from nybble.models.sources.open import open_source
from nybble.pipelines.begun import REQUEST, begin
from nybble.pipelines.search_job import (
    MEASURED,
    Asked,
    SearchSettings,
    bare,
    check_least,
    costs_of,
    layer_rows,
    parse_budget,
    problem_of,
    scheme_of,
    searched_layers,
    sized,
)  # fmt: skip
from nybble.pipelines.search_training import search_in_training
from nybble.quantizer import Quantizer
from nybble.report.search import render
from nybble.search.groups import found_groups, given_groups, see
from nybble.search.kept import Kept
from nybble.search.losses import next_token, own_labels
from nybble.search.menu import parse_menu, parse_pairs
from nybble.search.predictions import Predictions
from nybble.search.problem import Choice, Problem
from nybble.search.recipe import format_recipe
from nybble.search.study import Study
from nybble.search.yardsticks import at_random, front, reversed_order, uniform

POINTS = 17
"""Budgets of the Pareto front."""


@explicit_settings()
def search(
    model: str | Path,
    out: str | Path,
    *,
    budget: str,
    menu: str | Sequence[str] = "int2,int3,int4,int8",
    method: str = "fisher",
    data: str = "builtin",
    activations: str | None = None,
    ignore: Sequence[str] = ("lm_head",),
    groups: Sequence[Sequence[str]] | None = None,
    targets: Sequence[str] = (),
    training: Mapping[str, Any] | None = None,
    judged_on: str | None = None,
    settings: SearchSettings | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Choose a format for each layer.

    Args:
        model: what :func:`~nybble.models.sources.open.open_source` takes; in float.
        out: a folder to write: ``scheme.yaml``, which ``quantize``, ``train`` and others take as ``--scheme``;
            ``search.json``; ``search.html``. It appears whole.
        budget: ``NAME=NUMBER``, a cost (:mod:`nybble.costs`) and the most that all searched layers may take. Times
            of ``latency`` are of this machine, now; a resumed search has those that it began with.
        menu: quantizer lines of weights, or short names (:func:`~nybble.search.menu.parse_menu`).
        method: a search recipe by name, or a YAML file.
        data: a SRC; of a method that trains, examples of what the model does, with their labels.
        activations: a quantizer line for the inputs of all searched layers. Without, they stay in float; a method that
            trains rounds them in each layer's own format (:func:`~nybble.search.menu.parse_pairs`).
        ignore: layers that stay in float, as of a scheme.
        groups: layers that share a format, instead of those found.
        targets: export targets that every format of the menu has to be right for.
        training: settings of the training (:class:`nybble.training.settings.TrainSettings`), over those of a recipe
            that trains; device, dtype, seed and seq_len are those of ``settings``.
        judged_on: held-out examples for it, measured before and after.
        settings: sizes and places; a mapping has some of the fields.
        progress: told after each measurement.
        announce: gets lines for people.

    Returns:
        What search.json holds.

    Raises:
        UsageError: an empty or duplicate menu, a budget that nothing meets (the message has the least), groups that
            leave a layer out or name it twice. SchemeError: a format that a layer or a target can't have. ModelError:
            the model is quantized. Nothing is left behind, but for OUT.partial of a run that was killed.
    """
    check_new_folder(out)
    found, recipe = settings_of(SearchSettings, settings, "SearchSettings"), format_recipe(method)
    if recipe.training is None and (training or judged_on):
        raise UsageError(
            f"method {recipe.name} trains nothing: settings of a training (--set) and held-out examples (--eval) say "
            "nothing to it, leave them out."
        )
    cost_name, amount = parse_budget(budget)
    check_source(data)
    inputs = Quantizer(activations) if activations else None
    if recipe.sensitivity is not None and not recipe.sensitivity.pairs:
        pairs = {name: (quantizer, inputs) for name, quantizer in parse_menu(menu).items()}
    else:
        pairs = {name: (w, i if inputs is None else inputs) for name, (w, i) in parse_pairs(menu).items()}
    asked = Asked(
        model=str(model), recipe=recipe, menu={name: weights for name, (weights, _) in pairs.items()},
        inputs=[entering for _, entering in pairs.values()], cost=make_cost(cost_name), cost_name=cost_name,
        budget=amount, ignore=tuple(ignore), targets=tuple(targets), data=data, settings=found, groups=groups,
        training=training or {}, judged_on=judged_on,
    )  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(preserve_global_rng())
        stack.enter_context(out_of_memory(found.device))
        return _searched(asked, Path(out), progress or Silent(), announce)


def _searched(asked: Asked, out: Path, progress: Progress, announce: Callable[[str], None]) -> dict[str, Any]:
    layers = searched_layers(asked)
    sizes = bare(layers)
    if not asked.cost.needs_macs:
        check_least(asked, layers, sizes)
    announce(f"{len(layers)} layers, {sum(size.elements for size in sizes):,} weights, {len(asked.menu)} formats")
    if asked.recipe.training is not None:
        return search_in_training(asked, layers, out, progress, announce)
    settings, source = asked.settings, open_source(asked.model)
    made: Any = source.model(float_dtype(settings.dtype, "dtype"), torch.device(settings.device))
    made.eval()
    if getattr(made.config, "use_cache", False):
        made.config.use_cache = False
    kind = data_kind(reads_of(made))
    parts = {}
    for part in ("calibration", "evaluation"):
        wanted = Wanted(part=part, samples=settings.samples, seq_len=settings.seq_len, fewer=True)
        parts[part] = kind.fitted(kind.prepare(asked.data, source, wanted), made)
        kind.check(parts[part], made)
    batches = {
        part: [
            kind.batch(samples.inputs, start, start + settings.batch, settings.device)
            for start in range(0, len(next(iter(samples.inputs.values()))), settings.batch)
        ]
        for part, samples in parts.items()
    }
    seen = see(
        made,
        [layer.target for layer in layers],
        lambda: made(**kind.batch(parts["calibration"].inputs, 0, 1, settings.device).inputs),
    )
    sizes = [sized(size, layer, seen.macs[size.name], made) for size, layer in zip(sizes, layers, strict=True)]
    if not asked.cost.measured:
        check_least(asked, layers, sizes)
    names = [layer.name for layer in layers]
    groups = found_groups(names, seen.readers) if asked.groups is None else given_groups(names, asked.groups)
    study = Study(
        model=made, layers=layers, batches=batches["calibration"], seed=settings.seed, progress=progress,
        loss=next_token if reads_of(made) == "tokens" else own_labels,
    )  # fmt: skip
    folder = AtomicFolder(out, resumable=True)
    with folder as partial:
        begin(partial, asked.to_dict(), asked.settings.resume)
        study = replace(study, keep=Kept(partial / MEASURED))
        if asked.cost.measured:
            announce("timing the menu's formats in the shapes of the layers")
            asked = replace(asked, cost=asked.cost.here(settings.device, study.keep))
            try:
                check_least(asked, layers, sizes)
            except NybbleError:  # a request that was refused leaves nothing to go on from
                shutil.rmtree(partial, ignore_errors=True)
                raise
        result = _chosen(asked, study, sizes, groups, batches["evaluation"])
        result["data"] = {part: dict(samples.manifest()) for part, samples in parts.items()}
        atomic_write_text(partial / "scheme.yaml", yaml.safe_dump(result["scheme"], sort_keys=False, width=1000))
        atomic_write_json(partial / "search.json", result)
        atomic_write_text(partial / "search.html", render(result))
        (partial / MEASURED).unlink(missing_ok=True)
        (partial / REQUEST).unlink()
    return result


def _chosen(
    asked: Asked, study: Study, sizes: Sequence[Sized], groups: Sequence[Sequence[int]], held_out: Sequence[Batch]
) -> dict[str, Any]:
    """Measure, choose, compare."""
    assert asked.recipe.sensitivity is not None
    losses = asked.recipe.sensitivity.measure(study)
    layers = study.layers
    costs = costs_of(asked, layers, sizes)
    elements = [sum(sizes[i].elements for i in members) for members in groups]
    sharp = asked.recipe.sensitivity.sharpness(study)
    problem = problem_of(
        asked,
        [layers[members[0]].name for members in groups],
        torch.stack([losses[list(members)].sum(0) for members in groups]),
        [[sum(costs[i][item] for i in members) for item in range(len(asked.menu))] for members in groups],
        sizes,
    )
    if sharp:
        sums = [sum(sharp[i] for i in members) for members in groups]
        problem = replace(problem, sharpness=[total / n for total, n in zip(sums, elements, strict=True)])
    choice = asked.recipe.loop.solve(problem)
    rivals = {"searched": choice}
    if asked.settings.random:
        rivals |= {f"uniform {n}": c for n, c in zip(asked.menu, uniform(problem, len(asked.menu)), strict=True)}
        with suppress(UsageError):  # a loop with a constraint of its own may find nothing
            rivals["reversed order"] = reversed_order(problem, asked.recipe.loop, elements)
        rivals |= {f"random {i + 1}": at_random(problem, asked.settings.seed, i) for i in range(asked.settings.random)}
    compared = _compared(asked, study, problem, sizes, groups, rivals, held_out)
    of = {i: choice[number] for number, members in enumerate(groups) for i in members}
    chosen = [of[i] for i in range(len(layers))]
    scheme = scheme_of(asked, layers, chosen)
    rows = layer_rows(asked, layers, sizes, costs, chosen)
    rows = [
        {**row, "sensitivity": lost, "loss": lost[item], **({"sharpness": sharp[i] / row["elements"]} if sharp else {})}
        for i, (row, lost, item) in enumerate(zip(rows, losses.tolist(), chosen, strict=True))
    ]
    points = [
        {"cost": asked.cost.shown(spent, sizes), "loss": lost}
        for spent, lost, _ in front(problem, asked.recipe.loop, POINTS)
    ]
    return {
        "format_version": 1, "request": asked.to_dict(), "unit": asked.cost.unit,
        "budget": asked.budget, "cost": asked.cost.shown(problem.cost(choice), sizes), "total": problem.cost(choice),
        "limit": problem.limit, "loss": problem.loss(choice), "layers": rows,
        "order": [row["name"] for row in sorted(rows, key=lambda row: -row["loss"])],
        "groups": [[layers[i].name for i in members] for members in groups], "front": points, "compared": compared,
        "scheme": scheme.to_dict(), "versions": versions(),
        **({"threads": torch.get_num_threads()} if asked.cost.measured else {}),
    }  # fmt: skip


def _compared(
    asked: Asked, study: Study, problem: Problem, sizes: Sequence[Sized], groups: Sequence[Sequence[int]],
    rivals: Mapping[str, Choice], held_out: Sequence[Batch],
) -> list[dict[str, Any]]:  # fmt: skip
    """Cost, expected loss, and held-out divergence of the float model's predictions, of each choice."""
    predictions = Predictions(replace(study, batches=held_out)) if asked.settings.random else None
    rows = []
    with task(study.progress, len(rivals), "choices on held-out data") as bar:
        for name, choice in rivals.items():
            row = {
                "name": name, "cost": asked.cost.shown(problem.cost(choice), sizes),
                "fits": problem.cost(choice) <= problem.limit, "loss": problem.loss(choice), "kl": None,
            }  # fmt: skip
            if predictions is not None:
                of = {i: choice[number] for number, members in enumerate(groups) for i in members}

                def measure(of: dict[int, int] = of, predictions: Predictions = predictions) -> list[float]:
                    with study.quantized(of):
                        return [predictions.divergence()]

                row["kl"] = study.keep(f"held out {name}", measure)[0]
            rows.append(row)
            bar.advance(note=name)
    return rows
