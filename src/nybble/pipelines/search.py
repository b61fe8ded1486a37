"""``nybble search MODEL OUT``: which format each layer gets, for a budget.

1. open the source; match what is searched, check the menu against every layer and the budget against the menu
2. load the model in float, run it once: what layers read, how often they multiply
3. measure what each layer loses in each format (every measurement is kept: a killed run goes on)
4. choose; compare with one format for all, with random choices of the same cost, and with the reversed order
5. scheme.yaml, search.json, search.html; the folder appears
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from nybble.checkpoint.marked import is_quantized
from nybble.core.device import check_device, out_of_memory
from nybble.core.dtypes import float_dtype
from nybble.core.errors import ModelError, SchemeError, UsageError
from nybble.core.explicit import explicit_settings
from nybble.core.files import AtomicFolder, atomic_write_json, atomic_write_text, check_new_folder
from nybble.core.options import at_least_one
from nybble.core.progress import Progress, Silent, task
from nybble.core.seeds import preserve_global_rng
from nybble.core.versions import versions
from nybble.costs import Cost, Sized, make_cost
from nybble.data.kinds import Batch, data_kind
from nybble.data.samples import Wanted
from nybble.data.text import check_source
from nybble.models.adapter import adapter_for, reads_of, under
from nybble.models.sources.folder import FolderSource
from nybble.models.sources.open import open_source
from nybble.pipelines.begun import REQUEST, begin
from nybble.pipelines.constrain import constrain
from nybble.quantizer import Quantizer
from nybble.report.search import render
from nybble.scheme import Rule, Scheme
from nybble.search.groups import found_groups, given_groups, see
from nybble.search.kept import Kept
from nybble.search.losses import next_token, own_labels
from nybble.search.menu import parse_menu
from nybble.search.predictions import Predictions
from nybble.search.problem import Choice, Problem
from nybble.search.recipe import FormatRecipe, format_recipe
from nybble.search.study import Layer, Study
from nybble.search.yardsticks import at_random, front, reversed_order, uniform
from nybble.solvers import make_solver
from nybble.walk.plan import make_plan

POINTS = 17
"""Budgets of the Pareto front."""
MEASURED = "measured.jsonl"


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Sizes and places.

    Attributes:
        samples: of calibration data, and as many held-out ones. seq_len: tokens of one. batch: samples a forward takes;
            gradients are squared batch by batch.
        random: assignments drawn for comparison; 0: the choice is compared with nothing. dtype: of the float model.
    """

    samples: int = 16
    seq_len: int = 256
    batch: int = 1
    random: int = 20
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        at_least_one(samples=self.samples, seq_len=self.seq_len, batch=self.batch)
        if self.random < 0:
            raise UsageError(f"random is {self.random}; it is a number of assignments, 0 or more.")
        check_device(self.device)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request after the checks that need no model."""

    model: str
    recipe: FormatRecipe
    menu: Mapping[str, Quantizer]
    cost: Cost
    cost_name: str
    budget: float
    inputs: Quantizer | None
    ignore: tuple[str, ...]
    targets: tuple[str, ...]
    data: str
    settings: SearchSettings
    groups: Sequence[Sequence[str]] | None = field(default=None)

    def to_dict(self) -> dict[str, Any]:
        """What decides the result."""
        settings = {k: v for k, v in asdict(self.settings).items() if k != "resume"}
        return {
            "model": self.model, "method": self.recipe.to_dict(), "menu": {k: str(v) for k, v in self.menu.items()},
            "budget": {self.cost_name: self.budget}, "activations": str(self.inputs or "none"), "data": self.data,
            "ignore": list(self.ignore), "targets": list(self.targets), "groups": self.groups, "settings": settings,
        }  # fmt: skip


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
    settings: SearchSettings | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Choose a format for each layer.

    Args:
        model: what :func:`~nybble.models.sources.open.open_source` takes; in float.
        out: a folder to write: ``scheme.yaml``, which ``quantize``, ``train`` and others take as ``--scheme``;
            ``search.json``; ``search.html``. It appears whole.
        budget: ``NAME=NUMBER``, a cost (:mod:`nybble.costs`) and the most that all searched layers may take.
        menu: quantizer lines of weights, or short names (:func:`~nybble.search.menu.parse_menu`).
        method: a search recipe by name, or a YAML file.
        data: a SRC.
        activations: a quantizer line for the inputs of all searched layers.
        ignore: layers that stay in float, as of a scheme.
        groups: layers that share a format, instead of those found.
        targets: export targets that every format of the menu has to be right for.
        settings: sizes and places.
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
    cost_name, amount = parse_budget(budget)
    found = settings or SearchSettings()
    check_source(data)
    asked = Asked(
        model=str(model), recipe=format_recipe(method), menu=parse_menu(menu), cost=make_cost(cost_name),
        cost_name=cost_name, budget=amount, inputs=Quantizer(activations) if activations else None,
        ignore=tuple(ignore), targets=tuple(targets), data=data, settings=found, groups=groups,
    )  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(preserve_global_rng())
        stack.enter_context(out_of_memory(found.device))
        return _searched(asked, Path(out), progress or Silent(), announce)


def parse_budget(text: str) -> tuple[str, float]:
    """``bits=4.0`` as a cost's name and a number.

    Raises:
        UsageError: not of this form, no such cost, or no number above 0.
    """
    name, equals, number = text.partition("=")
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    if not equals or not 0 < amount < math.inf:
        raise UsageError(f"a budget is a cost and a number above 0, as bits=4.0 or bytes=60000000; got {text!r}.")
    make_cost(name.strip())
    return name.strip(), amount


def _searched(asked: Asked, out: Path, progress: Progress, announce: Callable[[str], None]) -> dict[str, Any]:
    if is_quantized(Path(asked.model)):
        raise ModelError(f"{asked.model} is quantized already; search over the float model that it was made from.")
    source = open_source(asked.model)
    if source.packed_names() and isinstance(source, FolderSource):  # a GGUF file stands for its floats, as for quantize
        raise ModelError(f"{asked.model} holds packed weights; search over the float model that it was made from.")
    layers = _layers(asked, source.skeleton(torch.bfloat16))
    sizes = [Sized(name=x.name, shape=x.target.shape, matrices=x.target.matrices, inputs=asked.inputs) for x in layers]
    if not asked.cost.needs_macs:
        _check_least(asked, layers, sizes)
    announce(f"{len(layers)} layers, {sum(size.elements for size in sizes):,} weights, {len(asked.menu)} formats")
    settings = asked.settings
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
    sizes = [replace(size, macs=seen.macs[size.name]) for size in sizes]
    _check_least(asked, layers, sizes)
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
        result = _chosen(asked, study, sizes, groups, batches["evaluation"])
        result["data"] = {part: dict(samples.manifest()) for part, samples in parts.items()}
        atomic_write_text(partial / "scheme.yaml", yaml.safe_dump(result["scheme"], sort_keys=False, width=1000))
        atomic_write_json(partial / "search.json", result)
        atomic_write_text(partial / "search.html", render(result))
        (partial / MEASURED).unlink(missing_ok=True)
        (partial / REQUEST).unlink()
    return result


def _layers(asked: Asked, skeleton: Any) -> list[Layer]:
    """What is searched, with each format of the menu checked against it."""
    adapter, solver = adapter_for(skeleton), make_solver("rtn", {})
    plans = []
    for quantizer in asked.menu.values():
        scheme = Scheme(rules=(Rule(weights=quantizer, inputs=asked.inputs),), ignore=asked.ignore)
        plan = make_plan(skeleton, adapter, scheme, solver)
        if asked.targets:
            constrain(scheme, asked.targets, skeleton, torch.bfloat16)
        prefixes = [under(block) for block in adapter.block_names(skeleton)]
        inside = [replace(t, name=p + t.name) for p, block in zip(prefixes, plan.blocks, strict=True) for t in block]
        plans.append([*inside, *plan.outside])
    first = plans[0]
    if not first:
        raise SchemeError("nothing is left to search; ignore fewer layers.")
    menus = zip(*[[target.rule.weights for target in plan] for plan in plans], strict=True)
    return [Layer(target=t, menu=[q for q in menu if q is not None]) for t, menu in zip(first, menus, strict=True)]


def _check_least(asked: Asked, layers: Sequence[Layer], sizes: Sequence[Sized]) -> None:
    """Refuse a budget that nothing meets, before anything is measured."""
    costs = [[asked.cost.of(size, q) for q in layer.menu] for layer, size in zip(layers, sizes, strict=True)]
    _problem(asked, [layer.name for layer in layers], torch.zeros(len(layers), len(asked.menu)), costs, sizes)


def _problem(
    asked: Asked, names: Sequence[str], losses: Tensor, costs: Sequence[Sequence[int]], sizes: Sequence[Sized]
) -> Problem:
    limit = asked.cost.limit(asked.budget, sizes)
    made = Problem(names=names, losses=losses.double(), costs=costs, limit=limit, unit=asked.cost.unit)
    made.check(asked.budget, asked.cost.shown(made.least, sizes))
    return made


def _chosen(
    asked: Asked, study: Study, sizes: Sequence[Sized], groups: Sequence[Sequence[int]], held_out: Sequence[Batch]
) -> dict[str, Any]:
    """Measure, choose, compare."""
    losses = asked.recipe.sensitivity.measure(study)
    layers = study.layers
    costs = [[asked.cost.of(size, q) for q in layer.menu] for layer, size in zip(layers, sizes, strict=True)]
    problem = _problem(
        asked,
        [layers[members[0]].name for members in groups],
        torch.stack([losses[list(members)].sum(0) for members in groups]),
        [[sum(costs[i][item] for i in members) for item in range(len(asked.menu))] for members in groups],
        sizes,
    )
    choice = asked.recipe.loop.solve(problem)
    elements = [sum(sizes[i].elements for i in members) for members in groups]
    rivals = {"searched": choice}
    if asked.settings.random:
        rivals |= {f"uniform {n}": c for n, c in zip(asked.menu, uniform(problem, len(asked.menu)), strict=True)}
        rivals["reversed order"] = reversed_order(problem, asked.recipe.loop, elements)
        rivals |= {f"random {i + 1}": at_random(problem, asked.settings.seed, i) for i in range(asked.settings.random)}
    compared = _compared(asked, study, problem, sizes, groups, rivals, held_out)
    of = {i: choice[number] for number, members in enumerate(groups) for i in members}
    scheme = _scheme(asked, layers, [layer.menu[of[i]] for i, layer in enumerate(layers)])
    rows = [
        {
            "name": layer.name, "elements": sizes[i].elements, "macs": sizes[i].macs, "chosen": [*asked.menu][of[i]],
            "weights": str(layer.menu[of[i]]), "bits": layer.menu[of[i]].format.bits, "cost": costs[i][of[i]],
            "bytes": sizes[i].matrices * int(layer.menu[of[i]].stored_bytes(sizes[i].shape)),
            "sensitivity": losses[i].tolist(),
        }
        for i, layer in enumerate(layers)
    ]  # fmt: skip
    points = [
        {"cost": asked.cost.shown(spent, sizes), "loss": lost}
        for spent, lost, _ in front(problem, asked.recipe.loop, POINTS)
    ]
    return {
        "format_version": 1, "request": asked.to_dict(), "unit": asked.cost.unit,
        "budget": asked.budget, "cost": asked.cost.shown(problem.cost(choice), sizes), "total": problem.cost(choice),
        "limit": problem.limit, "loss": problem.loss(choice), "layers": rows,
        "groups": [[layers[i].name for i in members] for members in groups], "front": points, "compared": compared,
        "scheme": scheme.to_dict(), "versions": versions(),
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


def _scheme(asked: Asked, layers: Sequence[Layer], chosen: Sequence[Quantizer]) -> Scheme:
    rules = tuple(
        Rule(targets=(layer.name,), weights=quantizer, inputs=asked.inputs)
        for layer, quantizer in zip(layers, chosen, strict=True)
    )
    return Scheme(rules=rules, ignore=asked.ignore, name=f"{asked.recipe.name} {asked.cost_name}={asked.budget:g}")
