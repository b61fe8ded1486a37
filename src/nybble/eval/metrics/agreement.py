"""Top-1 agreement: the fraction of predictions whose likeliest token is the float model's."""

from __future__ import annotations

from nybble.eval._metric import Metric

PART = Metric(
    per_token=lambda rows, reference: (rows.top == reference.top).float(),
    needs_reference=True,
    unit="fraction",
    summary="how often the likeliest token is the float model's",
)
