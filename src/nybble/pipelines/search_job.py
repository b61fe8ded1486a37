"""A request of ``nybble search``, and what can be wrong with it before anything is measured or trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.checkpoint.marked import is_quantized
from nybble.core.device import check_device
from nybble.core.errors import ModelError, SchemeError, UsageError
from nybble.core.options import at_least_one
from nybble.costs import Cost, Sized, make_cost
from nybble.models.adapter import adapter_for, under
from nybble.models.sources.folder import FolderSource
from nybble.models.sources.open import open_source
from nybble.pipelines.constrain import constrain
from nybble.quantizer import Quantizer
from nybble.scheme import Rule, Scheme
from nybble.search.problem import Problem
from nybble.search.recipe import FormatRecipe
from nybble.search.study import Layer
from nybble.solvers import make_solver
from nybble.walk.plan import make_plan

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
    """A request after the checks that need no model.

    ``inputs``: of layers in each format of the menu. ``training``: settings of a method that trains, over the recipe's;
    ``judged_on``: its held-out examples.
    """

    model: str
    recipe: FormatRecipe
    menu: Mapping[str, Quantizer]
    cost: Cost
    cost_name: str
    budget: float
    inputs: Sequence[Quantizer | None]
    ignore: tuple[str, ...]
    targets: tuple[str, ...]
    data: str
    settings: SearchSettings
    groups: Sequence[Sequence[str]] | None = field(default=None)
    training: Mapping[str, Any] = field(default_factory=dict)
    judged_on: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """What decides the result."""
        settings = {k: v for k, v in asdict(self.settings).items() if k != "resume"}
        lines = {name: str(q or "none") for name, q in zip(self.menu, self.inputs, strict=True)}
        entering = lines if len({*lines.values()}) > 1 else next(iter(lines.values()))
        found = {
            "model": self.model, "method": self.recipe.to_dict(), "menu": {k: str(v) for k, v in self.menu.items()},
            "budget": {self.cost_name: self.budget}, "activations": entering, "data": self.data,
            "ignore": list(self.ignore), "targets": list(self.targets), "groups": self.groups, "settings": settings,
        }  # fmt: skip
        return found | ({"training": dict(self.training), "eval": self.judged_on} if self.recipe.training else {})


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


def searched_layers(asked: Asked) -> list[Layer]:
    """What is searched, with each format of the menu checked against it.

    Raises:
        ModelError: the model is quantized. SchemeError: a layer can't have a format; nothing is left.
    """
    if is_quantized(Path(asked.model)):
        raise ModelError(f"{asked.model} is quantized already; search over the float model that it was made from.")
    source = open_source(asked.model)
    if source.packed_names() and isinstance(source, FolderSource):  # a GGUF file stands for its floats, as for quantize
        raise ModelError(f"{asked.model} holds packed weights; search over the float model that it was made from.")
    skeleton = source.skeleton(torch.bfloat16)
    adapter, solver = adapter_for(skeleton), make_solver("rtn", {})
    plans = []
    for quantizer, inputs in zip(asked.menu.values(), asked.inputs, strict=True):
        scheme = Scheme(rules=(Rule(weights=quantizer, inputs=inputs),), ignore=asked.ignore)
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
    return [
        Layer(target=t, menu=[q for q in menu if q is not None], inputs=asked.inputs)
        for t, menu in zip(first, menus, strict=True)
    ]


def sized(size: Sized, layer: Layer, macs: int, model: Any) -> Sized:
    """With what a forward of one sample showed; a model that writes text multiplies one row a token."""
    target = layer.target
    rows = 1 if getattr(model, "can_generate", bool)() else max(1, macs // (target.shape[0] * target.shape[1]))
    return replace(size, macs=macs, rows=rows, linear=target.kind.by_rows and not target.kind.fused)


def check_least(asked: Asked, layers: Sequence[Layer], sizes: Sequence[Sized]) -> None:
    """Refuse a budget that nothing meets, before anything is measured."""
    losses = torch.zeros(len(layers), len(asked.menu))
    problem_of(asked, [layer.name for layer in layers], losses, costs_of(asked, layers, sizes), sizes)


def costs_of(asked: Asked, layers: Sequence[Layer], sizes: Sequence[Sized]) -> list[list[int]]:
    """What each layer costs in each format of the menu."""
    return [
        [asked.cost.of(replace(size, inputs=i), q) for q, i in zip(layer.menu, asked.inputs, strict=True)]
        for layer, size in zip(layers, sizes, strict=True)
    ]


def bare(layers: Sequence[Layer]) -> list[Sized]:
    """Layers as far as their shapes say."""
    return [Sized(name=x.name, shape=x.target.shape, matrices=x.target.matrices) for x in layers]


def problem_of(
    asked: Asked, names: Sequence[str], losses: Tensor, costs: Sequence[Sequence[int]], sizes: Sequence[Sized]
) -> Problem:
    """What a loop is asked, with the budget as its limit.

    Raises:
        UsageError: nothing meets it; the message has the least.
    """
    limit = asked.cost.limit(asked.budget, sizes)
    sides = zip(asked.menu.values(), asked.inputs, strict=True)
    bits = [(weights.format.bits, 0 if inputs is None else inputs.format.bits) for weights, inputs in sides]
    made = Problem(names=names, losses=losses.double(), costs=costs, limit=limit, unit=asked.cost.unit, bits=bits)
    made.check(asked.budget, asked.cost.shown(made.least, sizes))
    return made


def scheme_of(asked: Asked, layers: Sequence[Layer], chosen: Sequence[int]) -> Scheme:
    """A rule a layer, for its format of the menu."""
    rules = tuple(
        Rule(targets=(layer.name,), weights=layer.menu[item], inputs=asked.inputs[item])
        for layer, item in zip(layers, chosen, strict=True)
    )
    return Scheme(rules=rules, ignore=asked.ignore, name=f"{asked.recipe.name} {asked.cost_name}={asked.budget:g}")


def layer_rows(
    asked: Asked, layers: Sequence[Layer], sizes: Sequence[Sized], costs: Sequence[Sequence[int]], chosen: Sequence[int]
) -> list[dict[str, Any]]:
    """Of search.json: what each layer got."""
    return [
        {
            "name": layer.name, "elements": size.elements, "macs": size.macs, "chosen": [*asked.menu][item],
            "weights": str(layer.menu[item]), "bits": layer.menu[item].format.bits, "cost": own[item],
            "bytes": size.matrices * int(layer.menu[item].stored_bytes(size.shape)),
        }
        for layer, size, own, item in zip(layers, sizes, costs, chosen, strict=True)
    ]  # fmt: skip
