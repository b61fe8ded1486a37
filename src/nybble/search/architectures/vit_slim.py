"""ViT-Slim: masks over features of heads, units of MLPs and tokens, learned with the weights under one l1 rule.

    search   weights and masks train together:  loss + w_a sum|z_a| + w_m sum|z_m| + w_p sum|tanh(z_p)|
    choose   one threshold for all layers of a kind; token sets are nested, the class token stays
    retrain  the network without what fell below, from the weights of the search
    slice    a ViT whose heads, MLPs and token sets have sizes of their own (:mod:`nybble.models.own.slim_vit`)

Chavan et al. 2022, "Vision Transformer Slimming", arXiv:2201.00814. Penalties are whole, however many processes train
(the authors' code divides them by their number). A binary mask on features computes what the slices do, gradients too,
so slicing comes first, and the smaller network retrains. With ``removed: zero`` tokens are multiplied by zero in
retraining, as the authors' code does it: until they are cut they still take part in each softmax, with the biases' keys
and values.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch

from nybble.core.errors import ModelError, SchemeError, UsageError
from nybble.core.progress import task
from nybble.core.seeds import generator
from nybble.search.architectures import Architecture, Budget, Found, Study, Training
from nybble.search.slimming import masks as soft
from nybble.search.slimming.choose import Kept, cheapest, choose, largest
from nybble.search.slimming.count import COSTS, UNITS
from nybble.search.slimming.slices import full_kept, sliced
from nybble.training.objective import Objective, make_losses, needs_teacher


def _search() -> Training:
    return Training(epochs=50, batch=256, lr=5e-4, optimizer="torch.AdamW weight_decay=1e-3")


def _retrain() -> Training:
    return Training(
        epochs=300, batch=256, lr=5e-4, schedule="cosine", warmup=0.02, optimizer="torch.AdamW weight_decay=0.05"
    )


@dataclass(frozen=True, kw_only=True)
class ViTSlim(Architecture):
    """See the module.

    Attributes:
        attention, mlp, tokens: weights of the penalties; 0 leaves that kind whole.
        heads: what a mask of attention is of: each ``feature`` of a head, a whole ``head``, or a feature of all heads
            of a ``layer``.
        tokens_share: of the patches that masks keep, where it isn't the others' share.
        removed: what retrains: without the tokens that fell below (``cut``), or with them multiplied by ``zero``.
        least: features of attention and units of MLP that each layer keeps whatever the threshold; 0: as published, and
            a layer that would be empty is an error.
        scores: what is thresholded: masks that are ``learned``; or, for comparison and without a search, ``random``
            widths, or the ``magnitude`` of weights at the same share in each layer.
        losses: what the network is told, by name (:mod:`nybble.training.losses`).
        search, retrain: the trainings.
        points: shares at which the network is judged before retraining, for the page.
    """

    begins_with: ClassVar[str] = "model"
    budgets: ClassVar[Mapping[str, str]] = UNITS
    attention: float = 2e-4
    mlp: float = 5e-5
    tokens: float = 0.0
    heads: Literal["feature", "head", "layer"] = "feature"
    tokens_share: float | None = None
    removed: Literal["cut", "zero"] = "cut"
    least: int = 1
    scores: Literal["learned", "random", "magnitude"] = "learned"
    losses: Mapping[str, Any] = field(default_factory=lambda: {"task": 1.0})
    search: Training = field(default_factory=_search)
    retrain: Training = field(default_factory=_retrain)
    points: int = 5

    def __post_init__(self) -> None:
        for kind, weight in self.weights.items():
            if weight < 0:
                raise SchemeError(f"vit-slim: {kind}={weight:g} is the weight of a penalty; give 0 or more.")
        if not self.kinds:
            raise SchemeError("vit-slim: all penalties are 0, which leaves nothing to search; give one of them.")
        if self.tokens_share is not None and not 0 < self.tokens_share <= 1:
            raise SchemeError(f"vit-slim: tokens_share={self.tokens_share:g} is above 0 and up to 1.")
        if self.least < 0 or self.points < 0:
            raise SchemeError(f"vit-slim: least={self.least} and points={self.points} are counts, 0 or more.")
        make_losses(self.losses)

    @property
    def weights(self) -> dict[str, float]:
        """Of the penalties, by kind."""
        return {kind: getattr(self, kind) for kind in soft.KINDS}

    @property
    def _tokens(self) -> Fraction | None:
        """The share of patches of its own, as the decimal that was typed."""
        return None if self.tokens_share is None else Fraction(str(self.tokens_share))

    @property
    def kinds(self) -> tuple[str, ...]:
        """That are searched."""
        return tuple(kind for kind, weight in self.weights.items() if weight)

    def check(self, study: Study) -> None:  # noqa: D102
        config = getattr(study.model, "config", None)
        if getattr(config, "model_type", None) != "vit" or not hasattr(study.model, "classifier"):
            raise ModelError(
                f"{study.name} is a {type(study.model).__name__}; ViT-Slim searches in ViTForImageClassification (DeiT "
                "without a distillation token is one)."
            )
        if not all(isinstance(getattr(config, name), int) for name in ("image_size", "patch_size")):
            raise ModelError(f"{study.name} has images or patches that aren't square, which ViT-Slim doesn't count.")
        if study.budget.name == "units" and (study.budget.amount > 1 or not {"attention", "mlp"} & {*self.kinds}):
            raise UsageError("a budget of units is a share up to 1 of features and units; search one of these.")
        full = full_kept(study.model)
        ends, count = cheapest(full, self.kinds, self.heads, self.least, self._tokens), COSTS[study.budget.name]
        study.budget.check(count(config, ends), count(config, full))
        study.examples(study.model)
        if study.judged_on is not None:
            study.held_out(study.model)

    def run(self, study: Study) -> Found:  # noqa: D102
        full, given = full_kept(study.model), copy.deepcopy(study.model)
        study.model.requires_grad_(True)
        rows = study.examples(given).rows
        held = study.held_out(given).rows if study.judged_on is not None else None
        objective = Objective(study.task(given), make_losses(self.losses), self._teacher(given))
        masks = soft.Masks(study.model, self.kinds, self.heads)
        if self.scores == "learned":
            self._learn(study, masks, objective, rows)
        scores = {kind: self._scores(study, given, masks, kind) for kind in self.kinds}
        share, kept = self._chosen(study.budget, given.config, scores, full)
        study.announce(f"a share of {float(share):.4f} of each kind is kept; the smaller network is trained")
        front = [] if held is None else self._front(study, scores, full, held)
        run, model = self._retrained(study, masks, kept, objective, rows)
        count = COSTS[study.budget.name]
        compared = [_row("full", given, full)]
        measures = {}
        if held is not None:
            measures = study.judge(model, held)
            compared[0] |= study.judge(given, held)
            if self.removed == "zero":
                compared.append(_row("found, tokens times zero", given, kept) | study.judge(study.model, held))
        compared.append(_row("found", given, kept) | measures | {"updates": run["steps"]})
        return Found(
            model=model, encoding=_encoding(share, kept), cost=count(given.config, kept),
            full=count(given.config, full), measures=measures, front=front, score="accuracy before retraining",
            compared=compared, parts=_parts(kept),
        )  # fmt: skip

    def _teacher(self, model: Any) -> Any:
        """The network as it was given, where a loss compares with it."""
        return model.requires_grad_(False).eval() if needs_teacher(make_losses(self.losses)) else None

    def _learn(self, study: Study, masks: soft.Masks, objective: Objective, rows: Any) -> None:
        """The search: masks in a group of their own, which doesn't decay."""
        learned = masks.parameters()
        mine = {id(mask) for mask in learned}
        others = [p for p in study.model.parameters() if id(p) not in mine]
        study.announce(f"{sum(mask.numel() for mask in learned):,} masks train with {len(rows):,} examples")
        groups: list[dict[str, Any]] = [{"params": others}, {"params": learned, "weight_decay": 0.0}]
        told = soft.Sparse(objective, masks, self.weights)
        study.train("search", study.model, rows, self.search, objective=told, groups=groups)

    def _scores(self, study: Study, given: Any, masks: soft.Masks, kind: str) -> list[torch.Tensor]:
        """By layer, of the shape that masks of the kind have."""
        found = masks.scores(kind)
        if self.scores == "learned":
            return found
        drawn = generator(study.seed, "vit-slim", kind)
        if self.scores == "random":  # an offset for each layer: widths are random, and not only which units
            return [torch.rand((), generator=drawn) + torch.rand(each.shape, generator=drawn) / 2 for each in found]
        return [_ranks(_magnitude(layer, kind, each)) for layer, each in zip(given.vit.layers, found, strict=True)]

    def _kept(self, scores: Mapping[str, Any], full: Kept, share: Fraction) -> Kept:
        return choose(scores, full, share, tokens=self._tokens, least=self.least)

    def _chosen(self, budget: Budget, config: Any, scores: Mapping[str, Any], full: Kept) -> tuple[Fraction, Kept]:
        """The largest share that the budget has room for, and what it keeps."""
        count = COSTS[budget.name]
        most, whole = budget.limit(count(config, full)), count(config, full)

        def fits(share: Fraction) -> bool:
            return count(config, self._unchecked(scores, full, share)) <= most

        share = largest(fits, min(Fraction(1), budget.amount) if budget.name == "units" else Fraction(1))
        if share is None:
            budget.check(count(config, self._unchecked(scores, full, Fraction(1, 10_000))), whole)
        assert share is not None
        return share, self._kept(scores, full, share)

    def _unchecked(self, scores: Mapping[str, Any], full: Kept, share: Fraction) -> Kept:
        try:
            return self._kept(scores, full, share)
        except ModelError:  # an empty layer costs least; whether that is an error is said of the share that is taken
            return choose(scores, full, share, tokens=self._tokens, least=1)

    def _front(
        self, study: Study, scores: Mapping[str, Any], full: Kept, held: Any
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Cost and accuracy of some shares, with the weights of the search as they are."""
        shares = [1 - Fraction(i * 7, 10 * max(1, self.points)) for i in range(self.points)]
        found = []
        with task(study.progress, len(shares), "shares on held-out examples") as bar:
            for share in shares:
                kept = self._unchecked(scores, full, share)

                def measure(kept: Kept = kept) -> list[float]:
                    return [study.judge(sliced(study.model, kept), held)["accuracy"]]

                cost = COSTS[study.budget.name](study.model.config, kept)
                found.append({"cost": cost, "score": study.keep(f"share {share}", measure)[0]})
                bar.advance()
        return found

    def _retrained(
        self, study: Study, masks: soft.Masks, kept: Kept, objective: Objective, rows: Any
    ) -> tuple[dict[str, Any], Any]:
        """What the last training came to, and the smaller network behind it."""
        if self.removed == "cut":
            model = sliced(study.model, kept)
            return study.train("retrain", model, rows, self.retrain, objective=objective), model
        masks.fix(kept)
        run = study.train("retrain", study.model, rows, self.retrain, objective=objective)
        return run, sliced(study.model, kept)


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    """0 to 1 within a layer: a threshold of all layers keeps the same share of each."""
    flat = scores.flatten()
    return (flat.argsort().argsort().double() / flat.numel()).view(scores.shape)


def _magnitude(layer: Any, kind: str, like: torch.Tensor) -> torch.Tensor:
    """Norms of all weights that go with a unit; of patches, which have none, their order."""
    if kind == "tokens":
        return -torch.arange(like.numel(), dtype=torch.float64)
    first, last = ("fc1", "fc2") if kind == "mlp" else ("q_proj", "o_proj")
    owner = layer.mlp if kind == "mlp" else layer.attention
    squares: torch.Tensor = getattr(owner, last).weight.double().square().sum(0) + getattr(
        owner, first
    ).weight.double().square().sum(1)
    if kind == "attention":
        squares = squares + owner.k_proj.weight.double().square().sum(1) + owner.v_proj.weight.double().square().sum(1)
    squares = squares.detach().cpu()
    if squares.numel() == like.numel():
        return squares.view(like.shape)
    by_head = squares.view(layer.attention.num_attention_heads, -1)
    return by_head.sum(1, keepdim=True) if like.shape[1] == 1 else by_head.sum(0, keepdim=True)


def _row(name: str, given: Any, kept: Kept) -> dict[str, Any]:
    """Of the table of networks."""
    return {"network": name, **{key: COSTS[key](given.config, kept) for key in ("parameters", "flops")}}


def _encoding(share: Fraction, kept: Kept) -> dict[str, Any]:
    return {
        "share": float(share), "head features": [each.sum(1).tolist() for each in kept["attention"]],
        "MLP units": [int(each.sum()) for each in kept["mlp"]], "patches": [int(each.sum()) for each in kept["tokens"]],
    }  # fmt: skip


def _parts(kept: Kept) -> list[dict[str, Any]]:
    """A row a layer."""
    every = zip(kept["attention"], kept["mlp"], kept["tokens"], strict=True)
    return [
        {
            "layer": str(number), "features of heads": ", ".join(str(size) for size in attention.sum(1).tolist()),
            "units of the MLP": int(mlp.sum()), "patches": int(tokens.sum()),
        }
        for number, (attention, mlp, tokens) in enumerate(every)
    ]  # fmt: skip


PART = ViTSlim
