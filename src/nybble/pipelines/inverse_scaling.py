"""``nybble eval MODEL --inverse-scaling TASKS``: tasks in which larger models do worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nybble.core.device import check_device
from nybble.core.errors import ModelError
from nybble.core.explicit import explicit_settings
from nybble.core.options import at_least_one
from nybble.core.progress import Progress, Silent
from nybble.core.versions import versions
from nybble.data.kinds import data_kind
from nybble.eval._logits import evaluating
from nybble.eval.inverse_scaling.examples import Questions
from nybble.eval.inverse_scaling.scoring import score
from nybble.eval.inverse_scaling.tasks import LOOKALIKE, TASKS, find_questions
from nybble.eval.inverse_scaling.trends import COLLAPSED, paired, summary
from nybble.models.adapter import reads_of
from nybble.nn.activation import measured_over_tokens
from nybble.nn.kv_model import recorded_kv
from nybble.pipelines.load import described_with_origin, load_with_origin

BATCH = 8


@explicit_settings()
def run_inverse_scaling(
    models: Mapping[str, str | Path],
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    reference: str | None = None,
    rows: int = 300,
    limit: int | None = None,
    batch: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score models in inverse-scaling tasks.

    Args:
        models: name -> what :func:`nybble.pipelines.load.load` takes: causal language models.
        tasks: names of :data:`nybble.eval.inverse_scaling.tasks.TASKS`, or files.
        folder: with the prize's files; a task that isn't there is a look-alike.
        reference: the name of the model that the others are compared with, row by row.
        rows: of a look-alike.
        limit: only the first so many rows of each task.
        batch: texts a forward takes; None: 8, or 1 where activations or a cache would share a scale among them.
        device: cpu or cuda.
        seed: of look-alikes.
        progress: told after each batch.

    Returns:
        ``tasks``: name -> ``kind``, ``cause``, ``metric``, ``source``, ``sha256``, ``lookalike``, ``expected``
        (numbers of rows that were published), ``models``: name -> ``metrics``, ``rows`` (each
        question's), ``collapsed`` (coverage below 1 %: the model is broken, which is no trend), and ``paired`` where
        there is a reference; ``versions``.

    Raises:
        UsageError: an unknown task. DataError: a file, a row that doesn't fit. ModelError: no causal language model.
    """
    check_device(device)
    at_least_one(rows=rows, limit=limit, batch=batch)
    asked = [_cut(find_questions(name, folder, rows, seed), limit) for name in tasks]
    for name, spec in models.items():
        model, _ = described_with_origin(spec)
        if reads_of(model) != "tokens" or not model.can_generate():
            raise ModelError(f"{name} ({spec}) is a {type(model).__name__}; these tasks ask causal language models.")
    found = {each.name: _told(each) for each in asked}
    for name, spec in models.items():
        model, origin = load_with_origin(spec, device=device, dense=True)
        tokenizer = data_kind(reads_of(model)).tokenizer(origin)
        if tokenizer is None:
            raise ModelError(f"{spec} has no tokenizer.")
        shared = bool(measured_over_tokens(model)) or recorded_kv(model) is not None
        size = batch or (1 if shared else BATCH)
        with evaluating(model):
            for each in asked:
                scored = score(model, tokenizer, each, batch=size, progress=progress or Silent())
                metrics = summary(each, scored)
                found[each.name]["models"][name] = {
                    "metrics": metrics, "collapsed": metrics["coverage"] < COLLAPSED, "rows": scored,
                }  # fmt: skip
    if reference is not None:
        for task in found.values():
            for name, told in task["models"].items():
                if name != reference:
                    told["paired"] = paired(task["models"][reference]["rows"], told["rows"])
    return {"format_version": 1, "tasks": found, "versions": versions()}


def _cut(asked: Questions, limit: int | None) -> Questions:
    return asked if limit is None else replace(asked, rows=asked.rows[:limit])


def _told(asked: Questions) -> dict[str, Any]:
    known = TASKS.get(asked.name)
    return {
        "kind": asked.kind, "cause": known.cause if known else "", "metric": known.metric if known else "",
        "source": asked.source, "sha256": asked.sha256, "lookalike": asked.source.startswith(LOOKALIKE),
        "questions": len(asked.rows), "expected": list(known.rows) if known else [], "models": {},
    }  # fmt: skip
