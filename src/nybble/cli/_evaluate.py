"""Evaluating a model and, where one is given, its float original; shared by ``eval`` and ``quantize --eval``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nybble.core.device import check_device
from nybble.core.errors import ModelError, UsageError, did_you_mean
from nybble.core.progress import Bars
from nybble.data import load_text, token_samples
from nybble.eval import METRICS, evaluate_many
from nybble.models.guard import reading
from nybble.pipelines.job import check_tokens
from nybble.pipelines.load import load


def run_eval(
    models: dict[str, str],
    data: str,
    metrics: Sequence[str],
    reference: str | None,
    seq_len: int,
    samples: int | None,
    device: str,
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Metrics of each model (name -> what to load), and the manifest of the tokens."""
    for metric in metrics:
        if metric not in METRICS.names():
            raise UsageError(f"unknown metric {metric!r}.{did_you_mean(metric, METRICS.names())}")
    loaded: dict[str, Any] = {}
    tokenizer: Any = None
    check_device(device)
    for name, spec in models.items():
        loaded[name], tokenizer = load(spec, device=device, dense=True)
    same = next((name for name, spec in models.items() if spec == reference), None)
    float_model = None if reference is None else loaded[same] if same else load(reference, device=device)[0]
    text = load_text(data, "evaluation", tokenizer)
    tokens = token_samples(text, tokenizer, samples=samples, seq_len=seq_len)
    with torch.no_grad():
        for name, spec in models.items():
            check_tokens(tokens, loaded[name])
            with reading(f"{spec} loads, but can't run; it", ModelError):
                loaded[name](tokens.input_ids[:1, :4].to(device), use_cache=False)
        found = evaluate_many(float_model, loaded, tokens.input_ids, metrics, progress=Bars())
    return {name: result.metrics for name, result in found.items()}, tokens.manifest() | {
        "predictions": next(iter(found.values())).tokens
    }
