"""Several metrics of several models in one pass: each batch runs each model once, the float one included.

Two sizes of piece keep memory and caches in bounds. The head multiplies a few hundred rows at a time (its weight is
read once a piece), the float32 arithmetic over the vocabulary takes as many rows as stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import DataError, ModelError, UsageError, within
from nybble.core.explicit import explicit_settings
from nybble.core.progress import Progress, Silent, task
from nybble.eval._logits import AnyPredictor, Predictor, evaluating
from nybble.eval._metric import LogitRows, Metric, total
from nybble.eval.metrics import METRICS

_HEAD_BYTES = 32 * 2**20  # logits of one head call of one model, in its dtype
_CACHE_BYTES = 2 * 2**20  # float32 logits of one step of the metrics on a CPU: about its second-level cache
_DEVICE_BYTES = 256 * 2**20  # the same elsewhere, where few large steps are best


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Metrics of one model, and how many predictions they are means over."""

    metrics: dict[str, float]
    tokens: int


def evaluate(
    model: nn.Module,
    tokens: Tensor,
    metrics: Sequence[str] = ("ppl",),
    reference: nn.Module | None = None,
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> EvalResult:
    """Compute metrics of one model; see :func:`evaluate_many`."""
    return evaluate_many(reference, {"model": model}, tokens, metrics, batch_size=batch_size, progress=progress)[
        "model"
    ]


@explicit_settings()
def evaluate_many(
    reference: nn.Module | None,
    models: Mapping[str, nn.Module],
    tokens: Tensor,
    metrics: Sequence[str] = ("ppl",),
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> dict[str, EvalResult]:
    """Compute metrics of several models on the same tokens; the reference runs once a batch, however many there are.

    Forwards run in each model's dtype, the metrics in float32 with float64 sums. ``reference`` itself may be among the
    models: its row costs no second forward.

    Args:
        reference: the float model, for metrics that compare with it.
        models: name -> causal language model, all over one vocabulary.
        tokens: int64 [N, L], L >= 2: windows that don't overlap, L - 1 predictions each (the first token is context).
        metrics: names from ``METRICS``.
        batch_size: windows a forward takes.
        progress: told after each batch.

    Raises:
        UsageError: unknown metric, or one that needs a reference without one.
        DataError: tokens of another shape or dtype, or outside the vocabulary.
        ModelError: vocabularies that differ, NaN or infinite results; names the model.
    """
    parts: dict[str, Metric] = {name: METRICS.get(name) for name in metrics}
    _check(parts, models, tokens, reference, batch_size)
    batches = [(tokens[start:stop], tokens[start:stop, 1:]) for start, stop in _pieces(0, len(tokens), batch_size)]
    return tally(parts, models, reference, batches, lambda model: Predictor(model, tokens), progress or Silent())


def tally(
    parts: Mapping[str, Metric],
    models: Mapping[str, nn.Module],
    reference: nn.Module | None,
    batches: Sequence[tuple[Any, Tensor]],
    predictor: Callable[[nn.Module], AnyPredictor],
    progress: Progress,
) -> dict[str, EvalResult]:
    """Metrics of several models over batches, each what predictors take and the targets, int64 [B, T].

    Args:
        parts: the metrics, by name.
        models: by name.
        reference: see :func:`evaluate_many`.
        batches: all of them.
        predictor: makes one of a model.
        progress: told after each batch.
    """
    if not any(metric.needs_reference for metric in parts.values()):
        reference = None  # not worth a forward
    everyone = [*models.values()] if reference is None else [reference, *models.values()]
    with evaluating(*everyone), task(progress, len(batches), "evaluate") as bar:
        found = _Tally(parts, models, reference, _predictors(models, reference, predictor))
        for given, targets in batches:
            found.add(given, targets)
            bar.advance()
    return found.results(sum(targets.numel() for _, targets in batches))


class _Tally:
    """Sums of every metric of every model over the batches seen."""

    def __init__(
        self,
        parts: Mapping[str, Metric],
        models: Mapping[str, nn.Module],
        reference: nn.Module | None,
        predictors: Mapping[int, AnyPredictor],
    ) -> None:
        self.parts = parts
        self.models = models
        self.reference = reference
        self.predictors = predictors
        first = next(iter(predictors.values()))
        self.device = first.device
        self.head_rows = max(1, _HEAD_BYTES // (first.vocabulary * first.itemsize))
        row_bytes = _CACHE_BYTES if first.device.type == "cpu" else _DEVICE_BYTES
        self.metric_rows = max(1, row_bytes // (first.vocabulary * 4))
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        self.sums = {name: dict.fromkeys(parts, zero) for name in models}

    def add(self, given: Any, targets: Tensor) -> None:
        """Run every model once on a batch and add up their metrics."""
        logits_of = {key: predictor.predict(given) for key, predictor in self.predictors.items()}
        targets = targets.flatten().to(self.device)
        for start, stop in _pieces(0, targets.numel(), self.head_rows):
            # Every model's logits of this piece, so that the reference's softmax is made once for all.
            logits = {key: of(start, stop).to(self.device) for key, of in logits_of.items()}
            for low, high in _pieces(start, stop, self.metric_rows):
                here = slice(low - start, high - start)
                rows = {key: LogitRows(x[here].float(), targets[low:high]) for key, x in logits.items()}
                self._add_rows(rows)

    def _add_rows(self, rows: Mapping[int, LogitRows]) -> None:
        for name, model in self.models.items():
            own = rows[id(model)]
            other = own if self.reference is None else rows[id(self.reference)]
            for metric, part in self.parts.items():
                self.sums[name][metric] = self.sums[name][metric] + total(part.per_token(own, other))

    def results(self, tokens: int) -> dict[str, EvalResult]:
        """Averages over this many predictions, finished."""
        found = {}
        for name, sums in self.sums.items():
            averages = {metric: value.item() / tokens for metric, value in sums.items()}
            if broken := [metric for metric, average in averages.items() if not math.isfinite(average)]:
                raise ModelError(
                    f"{name}: {', '.join(broken)} came out as {averages[broken[0]]}: the logits hold NaN or infinity."
                    " Look for NaN weights, or run in bfloat16 or float32 instead of float16."
                )
            metrics = {metric: self.parts[metric].finish(average) for metric, average in averages.items()}
            found[name] = EvalResult(metrics=metrics, tokens=tokens)
        return found


def _pieces(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for low in range(start, stop, size):
        yield low, min(low + size, stop)


def _check(
    parts: Mapping[str, Metric],
    models: Mapping[str, nn.Module],
    tokens: Tensor,
    reference: nn.Module | None,
    batch_size: int,
) -> None:
    if not parts or not models:
        raise UsageError("nothing to evaluate: give at least one model and one metric.")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; it must be 1 or more.")
    if needy := [name for name, metric in parts.items() if metric.needs_reference and reference is None]:
        raise UsageError(
            f"metric {needy[0]!r} compares with the float model. Give it as the reference, or ask for ppl."
        )
    if tokens.dtype != torch.int64 or tokens.ndim != 2:
        raise DataError(f"tokens are {tokens.dtype} {list(tokens.shape)}; evaluation takes int64 [windows, length].")
    if tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise DataError(f"tokens of shape {list(tokens.shape)} leave nothing to predict: windows of 2 or more needed.")


def _predictors(
    models: Mapping[str, nn.Module], reference: nn.Module | None, make: Callable[[nn.Module], AnyPredictor]
) -> dict[int, AnyPredictor]:
    """A predictor per distinct model, by id; the reference's is the first. All must share one vocabulary."""
    named = list(models.items()) if reference is None else [("the reference", reference), *models.items()]
    predictors: dict[int, AnyPredictor] = {}
    for name, model in named:
        if id(model) not in predictors:
            with within(name):
                predictors[id(model)] = make(model)
        first, own = next(iter(predictors.values())).vocabulary, predictors[id(model)].vocabulary
        if own != first:
            raise ModelError(
                f"{name} has logits over {own} tokens, {named[0][0]} over {first}; they can't be compared."
            )
    return predictors
