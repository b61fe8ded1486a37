"""A search in training: a policy draws formats while ``nybble train``'s loop trains the network (FLIQS).

It has no loop of its own: a training recipe is made of the request (twins with a menu of quantizers, the callback
``policy`` with the groups and what they cost), and :func:`nybble.pipelines.train.train` runs it, with its checkpoints,
its page and its measures. What it packs lies in OUT/model, trained; OUT/scheme.yaml says which format each layer got.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from nybble.core.errors import NybbleError, UsageError
from nybble.core.files import AtomicFolder, atomic_write_json, atomic_write_text
from nybble.core.progress import Progress
from nybble.core.versions import versions
from nybble.costs import Sized
from nybble.pipelines.begun import REQUEST, begin
from nybble.pipelines.load import load_with_origin
from nybble.pipelines.search_job import (
    MEASURED,
    Asked,
    bare,
    check_least,
    costs_of,
    layer_rows,
    scheme_of,
    sized,
)  # fmt: skip
from nybble.pipelines.train import train
from nybble.report.search import render
from nybble.scheme import Rule, Scheme
from nybble.search.groups import found_groups, given_groups, see
from nybble.search.kept import Kept
from nybble.search.study import Layer
from nybble.training.policy import PolicyOptions
from nybble.training.recipe import TrainingRecipe
from nybble.training.tasks import task_of

MODEL = "model"


def search_in_training(
    asked: Asked, layers: Sequence[Layer], out: Path, progress: Progress, announce: Callable[[str], None]
) -> dict[str, Any]:
    """As :func:`nybble.pipelines.search.search`, of a recipe that trains.

    Raises:
        UsageError: the loop is no policy; else as there, and what training raises.
    """
    if not isinstance(asked.recipe.loop, PolicyOptions):
        raise UsageError(f"method {asked.recipe.name} trains, which the loop policy does; name it as the loop.")
    sizes, groups = _seen(asked, layers)
    with AtomicFolder(out, resumable=True) as partial:
        begin(partial, asked.to_dict(), asked.settings.resume)
        if asked.cost.measured:
            asked = replace(asked, cost=asked.cost.here(asked.settings.device, Kept(partial / MEASURED)))
        try:
            check_least(asked, layers, sizes)
            if not (partial / MODEL).exists():
                recipe = _recipe(asked, layers, sizes, groups)
                train(
                    recipe, asked.model, partial / MODEL, asked.data, judged_on=asked.judged_on,
                    settings=_settings(asked), form="native", progress=progress, announce=announce,
                )  # fmt: skip
        except NybbleError:  # what was refused leaves nothing to go on from
            if not (partial / f"{MODEL}.partial").exists():
                shutil.rmtree(partial, ignore_errors=True)
            raise
        told = json.loads((partial / MODEL / "training.json").read_text(encoding="utf-8"))
        result = _result(asked, layers, sizes, groups, told)
        atomic_write_text(partial / "scheme.yaml", yaml.safe_dump(result["scheme"], sort_keys=False, width=1000))
        atomic_write_json(partial / "search.json", result)
        atomic_write_text(partial / "search.html", render(result))
        (partial / MEASURED).unlink(missing_ok=True)
        (partial / REQUEST).unlink()
    return result


def _seen(asked: Asked, layers: Sequence[Layer]) -> tuple[list[Sized], list[list[int]]]:
    """Sizes and groups, by a forward of one example."""
    loaded, origin = load_with_origin(asked.model, dtype=torch.float32, device=asked.settings.device)
    made: Any = loaded.train(False)
    task = task_of(made, asked.model)
    rows = task.load(asked.data, origin, made, asked.settings.seq_len, "calibration").rows[:1]
    one = {name: tensor.to(asked.settings.device) for name, tensor in task.collate(rows).items()}
    seen = see(made, [layer.target for layer in layers], lambda: made(**one))
    sizes = [sized(size, layer, seen.macs[size.name], made) for size, layer in zip(bare(layers), layers, strict=True)]
    names = [layer.name for layer in layers]
    groups = found_groups(names, seen.readers) if asked.groups is None else given_groups(names, asked.groups)
    return sizes, groups


def _recipe(
    asked: Asked, layers: Sequence[Layer], sizes: Sequence[Sized], groups: Sequence[Sequence[int]]
) -> TrainingRecipe:
    """Of quantization-aware training, with a menu and a policy."""
    assert asked.recipe.training is not None
    (weights, *more), (inputs, *entering) = [*asked.menu.values()], asked.inputs
    costs, limit = costs_of(asked, layers, sizes), asked.cost.limit(asked.budget, sizes)
    own = {field.name: getattr(asked.recipe.loop, field.name) for field in fields(PolicyOptions)}
    named = [(layers[members[0]].name, members) for members in groups]
    policy = {
        **own, "target": float(limit), "groups": {name: [layers[i].name for i in members] for name, members in named},
        "costs": {
            name: [float(sum(costs[i][item] for i in members)) for item in range(len(asked.menu))]
            for name, members in named
        },
    }  # fmt: skip
    given: Mapping[str, Any] = asked.recipe.training.get("options", {})
    menus = {"weights": {"menu": {"others": [str(each) for each in more]}}}
    if any(each != inputs for each in entering):  # what enters is chosen, too
        menus["inputs"] = {"menu": {"others": [str(each) for each in entering]}}
    options = {
        **given, "learned": {**given.get("learned", {}), **menus},
        "callbacks": {**given.get("callbacks", {}), "policy": policy},
    }  # fmt: skip
    scheme = Scheme(rules=(Rule(weights=weights, inputs=inputs),), ignore=asked.ignore, name=asked.recipe.name)
    return TrainingRecipe(name=asked.recipe.name, method="qat", scheme=scheme, options=options)


def _settings(asked: Asked) -> dict[str, Any]:
    """Of the loop: the recipe's, then what was asked for, then those that all searches have."""
    assert asked.recipe.training is not None
    own = {key: getattr(asked.settings, key) for key in ("device", "dtype", "seed", "seq_len", "resume")}
    return {**asked.recipe.training.get("settings", {}), **own, **asked.training}


def _result(
    asked: Asked, layers: Sequence[Layer], sizes: Sequence[Sized], groups: Sequence[Sequence[int]], told: dict[str, Any]
) -> dict[str, Any]:
    """What search.json holds."""
    policy, costs = told["callbacks"]["policy"], costs_of(asked, layers, sizes)
    chosen = [int(policy["layers"][layer.name]["choice"]) for layer in layers]
    limit, total = asked.cost.limit(asked.budget, sizes), sum(own[i] for own, i in zip(costs, chosen, strict=True))
    likely = [policy["layers"][layer.name]["probability"] for layer in layers]
    rows = [
        {**row, "inputs": str(asked.inputs[item] or "float"), "probability": each}
        for row, item, each in zip(layer_rows(asked, layers, sizes, costs, chosen), chosen, likely, strict=True)
    ]
    paid: dict[str, int] = {"searched": total}
    paid |= {f"uniform {name}": sum(own[item] for own in costs) for item, name in enumerate(asked.menu)}
    compared = [
        {"name": name, "cost": asked.cost.shown(cost, sizes), "fits": cost <= limit} for name, cost in paid.items()
    ]
    return {
        "format_version": 1, "request": asked.to_dict(), "unit": asked.cost.unit, "budget": asked.budget,
        "cost": asked.cost.shown(total, sizes), "total": total, "limit": limit, "layers": rows,
        "groups": [[layers[i].name for i in members] for members in groups], "compared": compared, "front": [],
        "policy": policy["updates"], "steps": told["steps"], "evaluation": told["evaluation"], "model": MODEL,
        "scheme": scheme_of(asked, layers, chosen).to_dict(), "versions": versions(),
        **({"threads": torch.get_num_threads()} if asked.cost.measured else {}),
    }  # fmt: skip
