"""Numbers as people read them, and what the page's words mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

ROLES = {
    "codes": "the packed low-bit numbers",
    "scales": "of blocks, and of static inputs",
    "offsets": "zero points, means and the like",
    "tables": "code books",
    "padding": "bits that packing leaves unused",
    "unquantized": "embeddings, norms and layers left in float",
    "exported": "the same weights once more, as another program loads them",
    "headers": "names and shapes of the stored tensors",
    "config": "config.json and other settings",
    "tokenizer": "vocabulary and chat template",
    "report": "nybble.json, README.md and pages: what was done to each layer, and how to load them",
    "generated texts": "that the model made to be trained on",
    "logs": "of the training, for TensorBoard",
}
METRICS = {
    "ppl": "Perplexity (lower is better)",
    "nll": "Mean negative log-likelihood, nats a token (lower is better)",
    "kl": "KL divergence from the float model, nats a token (lower is better)",
    "agreement": "Top-1 agreement with the float model (higher is better)",
    "cosine": "Cosine similarity to the float model (higher is better)",
    "cosine_min": "The same, of the worst sentence (higher is better)",
    "top1": "Top-1 accuracy (higher is better)",
    "accuracy": "Accuracy, share of the examples (higher is better)",
    "loss": "Mean loss a record (lower is better)",
    "pearson": "Pearson correlation with the labels (higher is better)",
    "bleu": "BLEU, 0 to 100 (higher is better)",
}
LANGUAGE = {"name": "language", "unit": "target tokens", "shown": "nll"}
"""The task of runs that don't say which: all were of language models then."""
MODELS = {"float": "Before (float)", "quantized": "After (quantized)"}


def task_of(training: Mapping[str, Any]) -> Mapping[str, str]:
    """What a training run's model does: the task's ``name``, the ``unit`` of targets, the metric ``shown`` first."""
    found = training.get("task", LANGUAGE)
    return found if isinstance(found, dict) else {}


def number(value: Any, digits: int = 4) -> str:
    """A number with so many digits, no exponent where it can be helped; other values as JSON.

    >>> number(14.23456), number(0.00012345, 3), number(1234567), number(None), number("text")
    ('14.23', '0.000123', '1,234,567', '', 'text')
    """
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, int):
        return f"{value:,}"
    if value != value or abs(value) == float("inf"):
        return str(value)
    if value != 0 and not 1e-6 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    size = len(str(int(abs(value)))) if abs(value) >= 1 else _leading_zeros(abs(value))
    return f"{value:,.{max(0, digits - size)}f}"


def _leading_zeros(value: float) -> int:
    """Minus the zeros after the decimal point, for a value below 1; 0 counts as 1."""
    return 0 if value == 0 else 1 + int(f"{value:e}".split("e")[1])


def percent(value: float | None) -> str:
    """A share as percent, three digits.

    >>> percent(0.0088), percent(None)
    ('0.880 %', '')
    """
    return "" if value is None else f"{number(100 * float(value), 3)} %"


def size(count: float) -> str:
    """Bytes, decimal units.

    >>> size(143_200_000), size(999)
    ('143.2 MB', '999 B')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:.0f} B"


def flatten(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested mappings as (dotted key, text) pairs; lists of plain values stay together.

    >>> flatten({"seed": 0, "data": {"sha256": "ab", "rules": [{"x": 1}]}})
    [('seed', '0'), ('data.sha256', 'ab'), ('data.rules.0.x', '1')]
    """
    nested: list[tuple[str, Any]] = []
    if isinstance(value, dict) and value:
        nested = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        nested = [(str(key), item) for key, item in enumerate(value)]
    if nested:
        return [pair for key, item in nested for pair in flatten(item, f"{path}.{key}" if path else key)]
    return [(path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]
