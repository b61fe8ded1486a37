"""Forces of stars: among themselves in float64; on massless particles in any number formats of nybble.

    a_i = sum_j m_j d / rho^3     j_i = sum_j m_j (u / rho^3 - 3 (d.u) d / rho^5)     rho^2 = |d|^2 + softening^2

with d = x_j - x_i, u = v_j - v_i: differences in float64, which then are rounded. All formats but fp64 are emulated, on
float64 numbers that were rounded, so none is quicker.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from nybble import Quantizer
from nybble.core.errors import DataError, UsageError
from nybble.scales.one import One

WIDE = {"fp64": torch.float64, "fp32": torch.float32}
PAIRS = {"cpu": 1 << 16, "cuda": 1 << 24}  # in memory at once
MET = "are at one place, and softening is 0: their force is infinite. Give a softening."


@dataclass(frozen=True, kw_only=True)
class Formats:
    """What particles' sums are rounded to: fp64, fp32 or quantizers' lines. UsageError: not one.

    ``differences`` of a ``block`` of stars share a scale, as do ``products`` m d / rho^3; ``masses`` are rounded once,
    ``sums`` after each addition, in the stars' order. 16-bit floats have no scale, narrower formats a power of two,
    unless a line says ``scale=``. Pairs nearer than ``exact_within`` are float64 until they are added.
    """

    differences: str = "fp64"
    masses: str = "fp64"
    products: str = "fp64"
    sums: str = "fp64"
    block: int = 32
    exact_within: float = 0.0

    def __post_init__(self) -> None:
        if self.block < 1 or not self.exact_within >= 0:
            raise UsageError(f"blocks of {self.block} stars, exact within {self.exact_within}; from 1, and from 0 on.")
        for line in (self.differences, self.masses, self.products, self.sums):
            rounding(line)
        if self.sums not in WIDE and not isinstance(quantizer(self.sums).scale, One):
            raise UsageError(f"sums in {self.sums!r} would share a scale; take fp32, fp16, bf16, or say scale=one.")


def quantizer(line: str) -> Quantizer:
    """A line's, with one scale a row."""
    own = Quantizer(line)
    if "scale=" in line or str(own.scale) != "absmax":  # the line's, or a preset's
        return Quantizer(line, token=True)
    return Quantizer(line, token=True, scale="one" if own.format.bits == 16 else "pow2(mode=rceil)")


@cache
def rounding(line: str) -> Callable[[Tensor], Tensor]:
    """float64 [rows, elements] to values of a format, float64 again."""
    return (lambda x: x.to(WIDE[line]).double()) if line in WIDE else quantizer(line).fake_quantize


def exact(x: Tensor, v: Tensor, stars: tuple[Tensor, ...], softening: float, own: Tensor | None = None) -> Tensor:
    """Acceleration, jerk and potential in float64, [bodies, 7]; ``stars``: positions, velocities, masses.

    ``own``: the bodies are the stars of these indices, and don't act on themselves. DataError: two at one place.
    """
    found, mass = [x.new_empty(0, 7)], stars[2]
    for at in torch.split(torch.arange(len(x), device=x.device), max(1, PAIRS[x.device.type] // len(mass))):
        d, u, soft = stars[0] - x[at, None], stars[1] - v[at, None], x.new_full((len(at), len(mass)), softening**2)
        if own is not None:
            soft[torch.arange(len(at), device=x.device), own[at]] = math.inf
        phi = -(mass / ((d * d).sum(2) + soft).sqrt()).sum(1, keepdim=True)
        found.append(torch.cat([*(part.sum(1) for part in _terms(d, u, mass, soft)), phi], 1))
    total = torch.cat(found)
    if not softening and not bool(total.isfinite().all()):
        raise DataError(f"two bodies {MET}")
    return total


def rounded(x: Tensor, v: Tensor, stars: tuple[Tensor, ...], softening: float, formats: Formats) -> Tensor:
    """Acceleration and jerk on particles in these formats, float64 [particles, 6]; ``stars`` as :func:`exact` has them.

    DataError: a sum beyond its format's range, or a particle on a star that nothing softens.
    """
    mass, at_once = rounding(formats.masses)(stars[2][None])[0], max(1, PAIRS[x.device.type] // formats.block)
    parts = zip(torch.split(x, at_once), torch.split(v, at_once), strict=True)
    total = torch.cat([x.new_empty(0, 6), *(_sums(*part, stars, mass, softening**2, formats) for part in parts)])
    largest = math.inf if formats.sums in WIDE else quantizer(formats.sums).format.max
    over = ~(total.abs() < largest).all(1)
    if bool(over.any()):
        why = "take a wider format for sums" if softening else f"or a particle and a star {MET}"
        raise DataError(f"{int(over.sum())} of {len(x)} force sums are beyond {formats.sums} ({largest:g}); {why}")
    return total


def _sums(x: Tensor, v: Tensor, stars: tuple[Tensor, ...], mass: Tensor, soft: float, formats: Formats) -> Tensor:
    operands, products, sums = (rounding(line) for line in (formats.differences, formats.products, formats.sums))
    total = x.new_zeros(len(x), 6)
    for of in torch.split(torch.arange(len(mass), device=x.device), formats.block):
        both = stars[0][of] - x[:, None], stars[1][of] - v[:, None]
        d, u = (operands(each.flatten(1)).view_as(each) for each in both)
        terms = torch.cat([products(part.flatten(1)).view_as(d) for part in _terms(d, u, mass[of], soft)], 2)
        if formats.exact_within:
            near = (both[0] * both[0]).sum(2, keepdim=True) < formats.exact_within**2
            terms = torch.where(near, torch.cat(_terms(*both, stars[2][of], soft), 2), terms)
        for term in terms.unbind(1):
            total = sums(total + term)
    return total


def _terms(d: Tensor, u: Tensor, mass: Tensor, soft: float | Tensor) -> tuple[Tensor, Tensor]:
    """Of acceleration and jerk, [particles, stars, 3] each; sums of three in a fixed order."""
    square = d[..., 0] * d[..., 0] + d[..., 1] * d[..., 1] + d[..., 2] * d[..., 2] + soft
    by = (mass / (square * square.sqrt()))[..., None]
    along = (d[..., 0] * u[..., 0] + d[..., 1] * u[..., 1] + d[..., 2] * u[..., 2]) / square
    return d * by, (u - 3 * along[..., None] * d) * by
