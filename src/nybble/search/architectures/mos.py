"""Mixture-of-Supernets: one training of a supernet whose feed-forward layers are mixed from experts, then evolution.

Jawahar et al. 2023 (arXiv:2306.04845). An architecture is a smaller config of the model: its tensors are the leading
parts of the model's, and feed-forward weights a mixture of experts that a router makes of the architecture
(:mod:`nybble.search.supernet`). ``experts: 1`` is plain weight sharing (once-for-all, HAT). Every update learns from
the largest, the smallest and a random architecture; evolution asks what each loses on held-out examples with these
weights; the chosen one is mixed once, and neither experts nor routers are left. ``formats`` join the search: weights
are rounded behind the mixing, so their scales are of what is deployed.

    architecture:
      mos:
        space: {encoder_ffn_dim: [512, 1024], decoder_layers: [1, 2, 3, 4], d_model: [128, 256]}

Where it differs from the released code: any key of the model's config is searched that makes a smaller network of it, a
value for all layers where the config has one for all; numbers of an architecture run from each key's least to its most
for translation, too; LayerNorm stays shared with both kinds of routers.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import yaml
from torch import Tensor

from nybble.core.errors import UsageError
from nybble.core.options import at_least_one
from nybble.core.seeds import derive_seed, generator
from nybble.data.pairs import IGNORED
from nybble.scheme import Rule, Scheme
from nybble.search.architectures import Architecture, Found, Study, Training
from nybble.search.evolution import Candidates, Encoding, Evolution, Scored
from nybble.search.kept import Kept
from nybble.search.supernet.mixture import Router
from nybble.search.supernet.net import FEED_FORWARD, Supernet
from nybble.search.supernet.sandwich import Sandwich
from nybble.search.supernet.space import Space, make_space
from nybble.training.objective import make_losses
from nybble.training.tasks import Row, Task

TOGETHER, TIMES = 64, 7
"""Examples of a forward that scores; forwards that a latency is the median of."""
Batch = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class MixtureOfSupernets(Architecture):
    """Options of the method.

    Attributes:
        space: key of the model's config -> values, at most the model's; of a key that has a list, for each entry.
        formats: quantizer lines of weights in blocks, or ``float``, the one with most bits first; none: no such gene.
        experts: of each mixed layer; 1 shares plainly. router: one distribution a ``layer``, or one a ``neuron``.
        hidden, dropout: of routers. mixed: linear layers that are mixed, as targets of a scheme.
        training: of the supernet. further: of what was found, alone; no steps: none.
        evolution: of the search. scored: held-out examples that a candidate's loss is of.
    """

    budgets: ClassVar[Mapping[str, str]] = {"parameters": "parameters", "latency": "µs a forward"}

    space: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    formats: tuple[str, ...] = ()
    experts: int = 2
    router: Router = "neuron"
    hidden: int = 128
    dropout: float = 0.0
    mixed: tuple[str, ...] = FEED_FORWARD
    training: Training = field(default_factory=Training)
    further: Training | None = None
    evolution: Evolution = field(default_factory=Evolution)
    scored: int = 512

    def __post_init__(self) -> None:
        at_least_one(experts=self.experts, hidden=self.hidden, scored=self.scored)
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout is {self.dropout:g}; it must be a share from 0 to below 1.")

    def check(self, study: Study) -> None:  # noqa: D102
        if study.data is None or study.judged_on is None:
            raise UsageError("a supernet is trained and scored on examples of what it does; give --data and --eval.")
        study.task_for(study.model).check(study.model, study.name, study.seq_len)
        shared = Supernet(study.model, self._space(study), mixed=self.mixed)
        if study.budget.name == "parameters":
            space = shared.space
            study.budget.check(shared.parameters_of(space.smallest), shared.parameters_of(space.largest))
        for encoding in shared.space.alone:
            shared.check_rounded(encoding)

    def run(self, study: Study) -> Found:  # noqa: D102
        task, rows = study.task_for(study.model), study.examples(study.model).rows
        held = study.held_out(study.model).rows
        study.model.requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(study.seed, "supernet"))
            supernet = Supernet(
                study.model, self._space(study), experts=self.experts, router=self.router, mixed=self.mixed,
                hidden=self.hidden, dropout=self.dropout,
            )  # fmt: skip
        looked = Looked(study, supernet, batches_of(task, held[: self.scored], study.device))
        study.budget.check(looked.cost(supernet.space.smallest), looked.cost(supernet.space.largest))
        objective = Sandwich(task, make_losses({"task": 1.0}), None)
        run = study.train("supernet", supernet, rows, self.training, objective=objective)
        scored = self.evolved(looked)
        best = scored[0].encoding
        model = supernet.collapsed(best, rounded=False)
        if self.further is not None:
            study.train("further", model, rows, self.further)
        return self._found(study, looked, scored, model, held, run)

    def _space(self, study: Study) -> Space:
        if not self.space and not self.formats:
            keys = [key for key, value in study.model.config.to_diff_dict().items() if type(value) is int and value > 1]
            raise UsageError(
                f"mos searches values of the model's config, and its space names none; --set 'space={{KEY: [VALUE, "
                f"VALUE]}}' with some of {', '.join(keys)}."
            )
        return make_space(study.model.config, self.space, self.formats)

    def evolved(self, looked: Looked) -> list[Scored]:
        """The candidates of the search, the best first; errors as of :meth:`Evolution.run`."""
        space, study = looked.supernet.space, looked.study
        least, limit = looked.cost(space.smallest), study.budget.limit(looked.cost(space.largest))
        candidates = Candidates(
            choices=space.sizes, score=looked.score, fits=lambda encoding: looked.cost(encoding) <= limit,
            limit=f"{study.budget.name} <= {limit:,}", least=f"The smallest has {least:,}.", start=[space.smallest],
        )  # fmt: skip
        return self.evolution.run(candidates, study.seed, study.keep, study.progress)

    def _found(
        self, study: Study, looked: Looked, scored: Sequence[Scored], model: Any, held: Sequence[Row],
        run: Mapping[str, Any],
    ) -> Found:  # fmt: skip
        supernet, best = looked.supernet, scored[0]
        measures, files = study.judge(model, held), {}
        quantizer = supernet.space.quantizer(best.encoding)
        if quantizer is not None:
            targets = tuple(supernet.quantized(supernet.network(best.encoding)))
            scheme = Scheme(rules=(Rule(targets=targets, weights=quantizer),), name=f"mos {quantizer}")
            files["scheme.yaml"] = yaml.safe_dump(scheme.to_dict(), sort_keys=False, width=1000).encode()
            if self.further is None:
                rounded = study.judge(supernet.collapsed(best.encoding), held)
                measures |= {f"{name} in {quantizer}": value for name, value in rounded.items()}
        return Found(
            model=model, encoding=supernet.space.values(best.encoding), cost=looked.cost(best.encoding),
            full=looked.cost(supernet.space.largest), measures=measures, score="held-out loss",
            front=_front(looked, scored), compared=_compared(looked, scored),
            parts=_parts(supernet, best.encoding, run), files=files,
        )  # fmt: skip


def batches_of(task: Task, rows: Sequence[Row], device: str) -> list[Batch]:
    """Held-out examples as batches that are always the same: what a task draws for them, it draws once."""
    found, augment = list[Batch](), task.augmentation("", rows)
    for start in range(0, len(rows), TOGETHER):
        batch: Batch = task.collate(rows[start : start + TOGETHER])
        if augment is not None:
            batch = augment(batch, generator(0, "scored", str(start)))
        found.append({name: tensor.to(device) for name, tensor in batch.items()})
    return found


@torch.no_grad()
def loss_of(model: Any, batches: Sequence[Batch]) -> float:
    """The mean loss a target of a model in evaluation mode."""
    total, count = 0.0, 0
    for batch in batches:
        labels = batch["labels"]
        targets = int((labels != IGNORED).sum()) if not labels.is_floating_point() else len(labels)
        total, count = total + targets * float(model(**batch).loss), count + targets
    return total / max(1, count)


class Looked:
    """What candidates cost and lose.

    Args:
        study: its budget says what a cost is.
        supernet: trained where candidates are scored.
        batches: held-out ones; a latency is of the first.
        table: of latencies; None: what the study keeps.
    """

    def __init__(self, study: Study, supernet: Supernet, batches: Sequence[Batch], table: Kept | None = None) -> None:
        self.study, self.supernet, self.batches = study, supernet.eval(), batches
        self.table = study.keep if table is None else table

    def score(self, encoding: Encoding) -> float:
        """The held-out loss, with the supernet's weights."""
        with self.supernet.running(encoding):
            return loss_of(_Once(self.supernet), self.batches)

    def cost(self, encoding: Encoding) -> int:
        """Units of the budget."""
        if self.study.budget.name == "parameters":
            return self.supernet.parameters_of(encoding)
        shape = encoding[: len(self.supernet.space.genes)]
        return int(self.table(f"latency {list(shape)}", lambda: [self._measured(encoding)])[0])

    @torch.no_grad()
    def _measured(self, encoding: Encoding) -> float:
        """Median microseconds of a forward over the first held-out batch, on the study's device."""
        model, batch = self.supernet.collapsed(encoding, rounded=False), self.batches[0]
        found = []
        for _ in range(TIMES + 2):  # the first ones load kernels
            began = time.perf_counter()
            model(**batch)
            if self.study.device == "cuda":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - began)
        return math.ceil(1e6 * statistics.median(found[2:]))


class _Once:
    """A supernet whose weights are made once for several batches."""

    def __init__(self, supernet: Supernet) -> None:
        self.network, self.weights = supernet.network(supernet.active), supernet.weights(supernet.active)

    def __call__(self, **batch: Tensor) -> Any:
        return torch.func.functional_call(self.network, self.weights, kwargs=batch, tie_weights=True)


def _front(looked: Looked, scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """The candidates that nothing beats in both cost and loss."""
    points, best = [], math.inf
    for cost, each in sorted(((looked.cost(each.encoding), each) for each in scored), key=lambda x: (x[0], x[1].score)):
        if each.score < best:
            best = each.score
            points.append({"cost": cost, "score": each.score, "name": "found" if each is scored[0] else ""})
    return points


def _compared(looked: Looked, scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """What was found beside the ends of the space, and beside what was drawn at random within the limit."""
    space, unit = looked.supernet.space, looked.study.budget.unit

    def row(name: str, encoding: Encoding, loss: float) -> dict[str, Any]:
        words = {key: str(value) for key, value in space.values(encoding).items()}
        return {"architecture": name, **words, unit: looked.cost(encoding), "held-out loss": loss}

    drawn = [each for each in scored if not each.generation and each.encoding != space.smallest]
    rows = [row("found", scored[0].encoding, scored[0].score)]
    if drawn:
        middle = drawn[len(drawn) // 2]
        rows.append(row(f"random, median of {len(drawn)}", middle.encoding, middle.score))
    ends = {"smallest": space.smallest, "largest": space.largest}
    return [*rows, *(row(name, encoding, looked.score(encoding)) for name, encoding in ends.items())]


def _parts(supernet: Supernet, best: Encoding, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What mixing costs in training; none of it is deployed."""
    routers = sum(p.numel() for name, p in supernet.mixtures.named_parameters() if ".router." in name)
    mixtures = sum(p.numel() for p in supernet.mixtures.parameters())
    counts = {
        "shared weights": sum(p.numel() for p in supernet.model.parameters()), "further experts": mixtures - routers,
        "routers": routers,
    }  # fmt: skip
    rows = [{"part": f"training: {name}", "bytes": 4 * count} for name, count in counts.items()]
    rows.append({"part": "training: optimizer states", "bytes": run["memory"]["optimizer states"]})
    return [*rows, {"part": "deployed, in float32", "bytes": 4 * supernet.parameters_of(best)}]


PART = MixtureOfSupernets
