"""What quantization cost a language model, in numbers: one metric a file; :func:`evaluate` computes them together."""

from __future__ import annotations

from nybble.eval._embeddings import embed, embedding_cosine
from nybble.eval._evaluate import METRICS, EvalResult, evaluate, evaluate_many
from nybble.eval._images import classification, classify
from nybble.eval._metric import LogitRows, Metric

__all__ = [
    "METRICS",
    "EvalResult",
    "LogitRows",
    "Metric",
    "classification",
    "classify",
    "embed",
    "embedding_cosine",
    "evaluate",
    "evaluate_many",
]
