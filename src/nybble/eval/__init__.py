"""What quantization cost a model, in numbers: one judge a kind of data, one metric of language models a file.

:func:`evaluate` computes metrics of language models together.
"""

from __future__ import annotations

from nybble.eval._evaluate import EvalResult, evaluate, evaluate_many
from nybble.eval._metric import LogitRows, Metric
from nybble.eval.judges.images import classification, classify
from nybble.eval.judges.sentences import embed, embedding_cosine
from nybble.eval.metrics import METRICS

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
