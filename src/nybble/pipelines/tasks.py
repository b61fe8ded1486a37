"""Judging a model by public tasks: what the harness asks, of any model that nybble loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nybble.core.device import check_device
from nybble.core.errors import ModelError
from nybble.core.explicit import explicit_settings
from nybble.core.options import at_least_one
from nybble.data.kinds import data_kind
from nybble.eval.harness import find_tasks, harness_version, load_tasks, run_harness
from nybble.models.adapter import reads_of
from nybble.nn.activation import measured_over_tokens
from nybble.pipelines.load import described_with_origin, load_with_origin

BATCH = 8
READ = ("tokens", "pairs")
"""Kinds of data whose models answer in text."""


@explicit_settings()
def run_tasks(
    models: Mapping[str, str | Path],
    tasks: Sequence[str],
    task_dir: str | Path | None = None,
    *,
    batch_size: int | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    seq_len: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Scores of models in the tasks of lm-evaluation-harness, one model after the other.

    Args:
        models: name -> what :func:`nybble.pipelines.load.load` takes; packed weights are dequantized once.
        tasks: names that the harness or ``task_dir`` has.
        task_dir: folder with YAML files of further tasks; see :func:`nybble.eval.harness.find_tasks`.
        batch_size: prompts at a time; None takes 8, or 1 where activations are measured over a whole batch (then a
            larger one, asked for, makes every answer depend on its neighbours and their padding).
        limit: only the first so many questions of each task.
        num_fewshot: solved examples in front of a question; None: as each task says.
        chat: put prompts into the chat template.
        seq_len: most tokens of prompt and answer; None: as the model's config says.
        device: cpu or cuda.

    Returns:
        ``models``: name -> ``TASK/METRIC`` -> value; ``data``: ``source`` and ``tasks``, as :func:`run_harness` says;
        ``notes``: name -> what to know of its figures, where there is something.

    Raises:
        UsageError: the package is missing or too old, an unknown task. DataError: a task that can't be read.
        ModelError: a model that makes no text, or can't be run. All but the last before weights are read.
    """
    check_device(device)
    at_least_one(batch_size=batch_size, limit=limit, seq_len=seq_len)
    source = f"lm_eval {harness_version()}"
    named = find_tasks(tasks, task_dir)  # a model may have to be fetched first
    for name, spec in models.items():
        _check_writes(name, spec)
    loaded = load_tasks(named)
    found: dict[str, dict[str, float]] = {}
    notes: dict[str, str] = {}
    manifest: dict[str, Any] = {}
    for name, spec in models.items():
        model, origin = load_with_origin(spec, device=device, dense=True)
        tokenizer = data_kind(reads_of(model)).tokenizer(origin)
        if tokenizer is None:
            raise ModelError(f"{spec} has no tokenizer.")
        shared = measured_over_tokens(model)
        size = batch_size or (1 if shared else BATCH)
        if shared and size > 1:
            layer, quantizer = next(iter(shared.items()))
            notes[name] = (
                f"{layer} ({quantizer}) measures its scale on the whole batch: answers depend on what stands beside "
                "them, padding included; batch size 1 leaves nothing beside them."
            )
        result = run_harness(
            model, tokenizer, loaded, batch_size=size, limit=limit, num_fewshot=num_fewshot,
            chat=chat, seq_len=seq_len,
        )  # fmt: skip
        found[name], manifest = result["metrics"], result["tasks"]
    return {"models": found, "data": {"source": source, "tasks": manifest}, "notes": notes}


def _check_writes(name: str, spec: str | Path) -> None:
    model, _ = described_with_origin(spec)
    if reads_of(model) not in READ or not model.can_generate():
        raise ModelError(f"{name} ({spec}) is a {type(model).__name__}, which makes no text: tasks can't ask it.")
