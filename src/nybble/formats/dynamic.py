"""Dynamic (tree) maps: ``dynamic8``, ``dynamic4``, ``dynamic3``, and unsigned ``udynamic8``, ``udynamic4``.

``udynamic4_de0`` has no zero.

Dettmers et al. 2022, arXiv:2110.02861. Decade i of D holds 10**(i - D + 1) times the midpoints of 2**i (signed) or
2**(i + 1) (unsigned) equal cells of [0.1, 1]; then 0 and 1 are added. There is no -1. DE-0 (Li et al. 2023,
arXiv:2309.01507) is the unsigned map whose zero is replaced by the next value, so that a second moment never becomes
zero; ``linear4`` is that paper's (i + 1) / 16.
"""

from __future__ import annotations

import re

import numpy as np

from nybble.core.errors import FormatError
from nybble.formats._base import Family, TableFormat, float32_steps


def dynamic_values(bits: int, signed: bool) -> np.ndarray:
    """float32, ascending: the map of ``bits`` bits."""
    decades = bits - 1
    values = [np.array([0.0, 1.0], np.float32)]
    for i in range(decades):
        edges = float32_steps(0.1, 1.0, 2**i if signed else 2 ** (i + 1))
        middles = np.float32(10.0 ** (i - decades + 1)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [middles, -middles] if signed else [middles]
    return np.sort(np.concatenate(values))


def _build(match: re.Match[str]) -> TableFormat:
    unsigned, bits_text, without_zero = match.groups()
    bits = int(bits_text)
    if not 2 <= bits <= 8:
        raise FormatError(f"{match[0]}: dynamic maps have 2 to 8 bits; got {bits}.")
    if without_zero and not unsigned:
        raise FormatError(f"{match[0]}: only the unsigned map has a variant without zero (u{match[0]}).")
    values = dynamic_values(bits, signed=not unsigned)
    if without_zero:
        values = np.append(values[1], values[1:])
    return TableFormat(match[0], bits, table=tuple(float(v) for v in values))


PART = Family(
    pattern=r"(u)?dynamic(\d+)(_de0)?",
    build=_build,
    listed=("dynamic8", "dynamic4", "dynamic3", "udynamic8", "udynamic4", "udynamic4_de0"),
)
