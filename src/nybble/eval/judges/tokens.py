"""Language models: metrics of the next token, and what models go on to write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nybble.core.progress import Progress
from nybble.data.samples import Origin, Samples
from nybble.eval._evaluate import evaluate_many
from nybble.eval.judges import Judge, Panel, Verdict
from nybble.eval.metrics import METRICS

PROMPT, ANSWER = 24, 40
"""Tokens of held-out text that a sample starts from, and that each model adds."""


def usual_metrics(compared: bool) -> tuple[str, ...]:
    """Perplexity; with a float model also what the quantized one does otherwise."""
    return ("ppl", "kl", "agreement") if compared else ("ppl",)


class Tokens(Judge):
    """By the registry of metrics."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(METRICS.names())

    @property
    def comparing(self) -> tuple[str, ...]:
        """As each metric says."""
        return tuple(name for name, metric in METRICS.all().items() if metric.needs_reference)

    def usual(self, compared: bool) -> tuple[str, ...]:
        """See :func:`usual_metrics`."""
        return usual_metrics(compared)

    def judge(self, panel: Panel, progress: Progress) -> Verdict:
        """All models in one pass over the windows."""
        ids = panel.samples.inputs["input_ids"]
        found = evaluate_many(panel.reference, panel.models, ids, panel.metrics, progress=progress)
        predictions = next(iter(found.values())).tokens
        return Verdict(
            metrics={name: result.metrics for name, result in found.items()}, counts={"predictions": predictions}
        )

    def texts(self, models: Mapping[str, Any], origin: Origin, samples: Samples, count: int) -> list[dict[str, str]]:
        """The beginnings of some windows, and how each model goes on."""
        return go_on(models, origin.tokenizer(), samples.inputs["input_ids"], count) if count else []


def go_on(models: Mapping[str, Any], tokenizer: Any, input_ids: Tensor, texts: int) -> list[dict[str, str]]:
    """What every model adds to the beginnings of some windows, taking the likeliest token each time.

    Args:
        models: by name; they can generate.
        tokenizer: theirs.
        input_ids: int64 [windows, length].
        texts: how many of them, evenly spread.

    Returns:
        A mapping each with ``prompt`` and every model's name.
    """
    found = []
    for row in torch.arange(min(texts, len(input_ids))) * len(input_ids) // max(1, texts):
        prompt = input_ids[row, :PROMPT][None]
        sample = {"prompt": tokenizer.decode(prompt[0], skip_special_tokens=True)}
        for name, model in models.items():
            ids = prompt.to(model.device)
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=ANSWER,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
            sample[name] = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        found.append(sample)
    return found


PART = Tokens()
