"""Code books given by their values: ``table[-1,-0.3,0,0.3,1]``, or made from data.

:func:`quantile_format` and :func:`kmeans_format` make them.
The values are in code order and part of the name, so that a file which names the format carries the whole of it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from nybble.core.errors import DataError, FormatError
from nybble.formats._base import Family, TableFormat

if TYPE_CHECKING:
    from torch import Tensor


def table_format(values: tuple[float, ...] | list[float]) -> TableFormat:
    """The format with these values in code order; as many bits as they need (at most 8)."""
    exact = tuple(float(np.float32(v)) for v in values)
    bits = max(1, (len(exact) - 1).bit_length())
    name = ",".join(str(np.float32(v)) for v in exact)  # the shortest that reads back as the same float32
    return TableFormat(f"table[{name}]", bits, table=exact)


def quantile_format(x: Tensor, bits: int) -> TableFormat:
    """Quantile quantization: a code book whose values are equally likely in ``x`` scaled to [-1, 1] (Dettmers 2022).

    Its largest value is below 1, so it goes with ``scale=absmax(target=1)``.

    Args:
        x: any shape; finite, not all equal.
        bits: 1 to 8.

    Raises:
        DataError: fewer different values than codes.
    """
    flat = x.detach().double().flatten().cpu().numpy()
    if not flat.size or not np.isfinite(flat).all():
        raise DataError("quantile: the data is empty or holds NaN or Inf.")
    middles = (np.arange(2**bits) + 0.5) / 2**bits
    values = np.quantile(flat, middles) / np.abs(flat).max() if np.abs(flat).max() > 0 else np.zeros(2**bits)
    if len(np.unique(np.float32(values))) < 2**bits:
        raise DataError(f"quantile: the data has too few different values for {2**bits} codes; use fewer bits.")
    return table_format([float(v) for v in values])


def kmeans_format(x: Tensor, bits: int, *, weight: Tensor | None = None, iterations: int = 100) -> TableFormat:
    """Lloyd's k-means in one dimension from the quantile code book: locally least squared error of ``x`` over max|x|.

    Args:
        x: any shape; finite.
        bits: 1 to 8.
        weight: importance of each element, same shape.
        iterations: at most so many rounds.
    """
    start = np.sort(quantile_format(x, bits).values)
    flat = x.detach().double().flatten().cpu().numpy()
    order = np.argsort(flat, kind="stable")
    flat = flat[order] / np.abs(flat).max()
    mass = np.ones_like(flat) if weight is None else weight.detach().double().flatten().cpu().numpy()[order]
    sums, masses = np.append(0, np.cumsum(flat * mass)), np.append(0, np.cumsum(mass))
    centres = start
    for _ in range(iterations):
        cuts = np.concatenate([[0], np.searchsorted(flat, (centres[1:] + centres[:-1]) / 2), [len(flat)]])
        total, part = np.diff(masses[cuts]), np.diff(sums[cuts])
        moved = np.where(total > 0, part / np.where(total > 0, total, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = np.sort(moved)
    return table_format([float(v) for v in centres])


def _build(match: re.Match[str]) -> TableFormat:
    try:
        values = [float(text) for text in match[1].split(",")]
    except ValueError as error:
        raise FormatError(
            f"{match[0]!r}: the values of a table are numbers with commas between: table[-1,0,1]."
        ) from error
    return table_format(values)


PART = Family(pattern=r"table\[(.*)\]", build=_build, listed=())
