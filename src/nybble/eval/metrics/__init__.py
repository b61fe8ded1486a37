"""Metrics of language models, one a file: a number per predicted token, averaged (:class:`nybble.eval._metric.Metric`).

Other packages add metrics through entry points of the group ``nybble.eval.metrics``.
"""

from __future__ import annotations

from nybble.core.registry import Registry
from nybble.eval._metric import Metric

METRICS = Registry("nybble.eval.metrics", "metric", lambda part: isinstance(part, Metric))
