"""Which format and block size a training wants, by the published law."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nybble.core.errors import UsageError
from nybble.lab.laws.forecast import Plan, warnings_of
from nybble.lab.laws.training import COST, PUBLISHED, TrainingLaw

BLOCKS: tuple[int | str, ...] = (32, 128, 512, "channel")
WIDTHS = (4, 6, 8)


def advise(N: float | None, D: float | None, compute: float | None, law: TrainingLaw = PUBLISHED) -> dict[str, Any]:
    """Formats and blocks by their loss.

    Args:
        N: weights of the linear layers.
        D: tokens.
        compute: FLOPs, of which what isn't given follows: the size at fixed data, the data at fixed size, or all.
        law: by which.

    Returns:
        ``N``, ``D``, ``bits``: the best width for D; ``bf16``: loss; ``formats``: rows of ``format``, ``block``,
        ``loss``, ``penalty``, ``critical_data``, the least loss first; ``chosen``: the first of the width next above
        the best one; ``warnings``.

    Raises:
        UsageError: too little is said, or more than agrees.
    """
    N, D = _sizes(N, D, compute, law)
    bits = law.bits_for_data(D)
    rows: list[dict[str, Any]] = []
    for width in WIDTHS:
        exponent, mantissa = law.best_layout(width)
        for block in BLOCKS:
            rows.append(
                {
                    "format": f"E{exponent}M{mantissa}", "bits": width, "block": block,
                    "loss": law.loss(N, D, exponent, mantissa, block),
                    "penalty": law.penalty(N, D, exponent, mantissa, block),
                    "critical_data": law.critical_data(N, exponent, mantissa, block),
                }
            )  # fmt: skip
    rows.sort(key=lambda row: row["loss"])
    width = next((width for width in WIDTHS if width >= bits), WIDTHS[-1])
    warned = [
        f"{named(row)}: past {row['critical_data']:.3g} tokens more raise the loss."
        for row in rows if row["critical_data"] < D
    ]  # fmt: skip
    return {
        "N": N, "D": D, "bits": bits, "bf16": law.loss(N, D), "formats": rows,
        "chosen": next(row for row in rows if row["bits"] == width),
        "warnings": warned + warnings_of(Plan(N=N, D=D), {}, published=law is PUBLISHED),
    }  # fmt: skip


def named(row: Mapping[str, Any]) -> str:
    """A row's format and block in words."""
    block = "with a scale a channel" if row["block"] == "channel" else f"in blocks of {row['block']}"
    return f"{row['format']} {block}"


def _sizes(N: float | None, D: float | None, compute: float | None, law: TrainingLaw) -> tuple[float, float]:
    for name, value in (("parameters", N), ("tokens", D), ("compute", compute)):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{name} is a number above 0; got {value!r}.")
    if compute is None:
        if N is None or D is None:
            raise UsageError("a training needs --parameters and --tokens, or --compute with one of them, or alone.")
        return N, D
    if N is not None and D is not None:
        raise UsageError("parameters, tokens and compute are one too many: leave one out.")
    if N is not None:
        return N, compute / (COST * law.bits_for_size(N, compute) * N)
    if D is not None:
        return compute / (COST * law.bits_for_data(D) * D), D
    _, size, tokens = law.best_of_compute(compute)
    return size, tokens
