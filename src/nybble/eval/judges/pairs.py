"""Encoder-decoders: metrics of the targets' tokens, and what models make of some inputs.

Of a bare one, which gives no logits, the decoder's last hidden states are compared, by the cosine of each token's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import DataError, UsageError
from nybble.core.progress import Progress, task
from nybble.data.pairs import IGNORED, PairSamples
from nybble.data.samples import Origin, Samples
from nybble.eval._evaluate import tally
from nybble.eval._logits import PairPredictor
from nybble.eval.judges import Judge, Panel, Verdict
from nybble.eval.judges.sentences import ask, embedding_cosine
from nybble.eval.judges.tokens import ANSWER, PROMPT, usual_metrics
from nybble.eval.metrics import METRICS

BATCH = 4


class Pairs(Judge):
    """By the registry of metrics, over targets."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The registry's, and what is left for a model without a head."""
        return (*METRICS.names(), "cosine")

    @property
    def comparing(self) -> tuple[str, ...]:
        """As each metric says, and the cosine."""
        return (*(name for name, metric in METRICS.all().items() if metric.needs_reference), "cosine")

    def usual(self, compared: bool) -> tuple[str, ...]:
        """As of language models, and the cosine."""
        return (*usual_metrics(compared), "cosine") if compared else usual_metrics(compared)

    def judge(self, panel: Panel, progress: Progress) -> Verdict:
        """All models in one pass over the pairs."""
        samples = panel.samples
        if not isinstance(samples, PairSamples):
            raise DataError("targets are needed to judge an encoder-decoder; nybble.data.pair_samples makes some.")
        if not all(_has_head(model) for model in panel.models.values()):
            return Verdict(metrics=_cosines(panel, progress))
        parts = {name: METRICS.get(name) for name in panel.metrics if name in METRICS.names()}
        if not parts:
            raise UsageError(
                "the cosine is of encoder-decoders without a head; this one predicts tokens: ask for ppl, kl."
            )
        real = samples.labels != IGNORED
        cut = [slice(start, start + BATCH) for start, _ in _batches(samples)]
        targets = [samples.labels[rows] if bool(real.all()) else samples.labels[rows][real[rows]] for rows in cut]
        batches = [(given, own) for (_, given), own in zip(_batches(samples), targets, strict=True)]
        found = tally(
            parts, panel.models, panel.reference, batches, lambda m: PairPredictor(m, samples.inputs), progress
        )
        return Verdict(
            metrics={name: result.metrics for name, result in found.items()},
            counts={"predictions": int(real.sum())},
        )

    def texts(self, models: Mapping[str, Any], origin: Origin, samples: Samples, count: int) -> list[dict[str, str]]:
        """The beginnings of some inputs, and what each model answers."""
        return answers(models, origin.tokenizer(), samples.inputs["input_ids"], count) if count else []


def _has_head(model: Any) -> bool:
    return model.get_output_embeddings() is not None


def _batches(samples: Samples) -> list[tuple[int, dict[str, Tensor]]]:
    starts = range(0, len(samples.inputs["input_ids"]), BATCH)
    return [(start, {name: t[start : start + BATCH] for name, t in samples.inputs.items()}) for start in starts]


@torch.no_grad()
def _cosines(panel: Panel, progress: Progress) -> dict[str, dict[str, float]]:
    """Of every token's last hidden state to the float model's."""
    if panel.reference is None or "cosine" not in panel.metrics:
        raise UsageError(
            "an encoder-decoder without a head is judged by its cosine to the float model; give a reference."
        )
    rows: dict[str, list[Tensor]] = {name: [] for name in ("", *panel.models)}
    batches = _batches(panel.samples)
    with task(progress, len(batches), "evaluate") as bar:
        for _, given in batches:
            for name, model in [("", panel.reference), *panel.models.items()]:
                hidden = ask(model, {key: t.to(next(model.parameters()).device) for key, t in given.items()}).hidden
                assert hidden is not None
                real = given.get("decoder_attention_mask")
                rows[name].append(hidden.flatten(0, 1).cpu() if real is None else hidden.cpu()[real.bool()])
            bar.advance()
    exact = torch.cat(rows.pop(""))
    return {name: embedding_cosine(exact, torch.cat(own)) for name, own in rows.items()}


def answers(models: Mapping[str, Any], tokenizer: Any, input_ids: Tensor, texts: int) -> list[dict[str, str]]:
    """What every model answers to some inputs, taking the likeliest token each time.

    Args:
        models: by name; those that can't generate are left out.
        tokenizer: theirs.
        input_ids: int64 [samples, length].
        texts: how many of them, evenly spread.

    Returns:
        A mapping each with ``prompt`` and every model's name.
    """
    found = []
    for row in range(min(texts, len(input_ids))):
        prompt = input_ids[row * len(input_ids) // texts][None]
        sample = {"prompt": tokenizer.decode(prompt[0, :PROMPT], skip_special_tokens=True)}
        for name, model in models.items():
            if model.can_generate():
                made = model.generate(prompt.to(model.device), max_new_tokens=ANSWER, do_sample=False)
                sample[name] = tokenizer.decode(made[0], skip_special_tokens=True)
        found.append(sample)
    return found


PART = Pairs()
