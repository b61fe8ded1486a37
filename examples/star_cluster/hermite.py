"""4th-order Hermite steps, each body with its own power of two (Makino and Aarseth 1992), stars first, particles after.

Stars never learn of particles: steps, sums and random numbers are their own, so their orbits are the same bits with and
without them. A particle sees the stars where they are predicted to be.
"""

import math
from collections.abc import Callable

import torch
from examples.star_cluster import forces, start
from torch import Tensor

from nybble.core.errors import UsageError

FLOOR = 2.0**-24
Field = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Indices, positions, velocities -> acceleration and jerk, [n, 6]."""


class Bodies:
    """x, v, a, j, float64 [n, 3]; times t and steps h, [n]; count: evaluations, and steps cut off at the floor.

    ``most``: the longest step; all are that long, or with ``eta`` what Aarseth's criterion says. UsageError: it is no
    power of two from 2^-24 to 1, or ``eta`` isn't between 0 and 1.
    """

    def __init__(self, x: Tensor, v: Tensor, most: float, eta: float | None) -> None:
        if not FLOOR <= most <= 1 or math.frexp(most)[0] != 0.5 or not 0 < (0.5 if eta is None else eta) < 1:
            raise UsageError(f"step {most}, eta {eta}; powers of two from 2^-24 to 1, and a number between 0 and 1.")
        self.x, self.v, self.most, self.eta = x.clone(), v.clone(), most, eta
        self.count = torch.zeros(2, dtype=torch.int64, device=x.device)
        self.t, self.h, self.a, self.j = x.new_zeros(len(x)), x.new_full((len(x),), most), x * 0, x * 0

    def begin(self, of: Field) -> None:
        """First forces and steps."""
        self.a, self.j = torch.split(of(torch.arange(len(self.x), device=self.x.device), self.x, self.v), 3, 1)
        if self.eta is not None:
            self.h = self._power(self.eta / 2 * self.a.norm(dim=1) / self.j.norm(dim=1))

    def _power(self, wanted: Tensor) -> Tensor:
        """The power of two that isn't above it, between the floor and the longest."""
        wanted = wanted.nan_to_num(self.most).clamp(max=self.most)
        self.count[1] += (wanted < FLOOR).sum()
        return torch.ldexp(torch.ones_like(wanted), torch.frexp(wanted.clamp(min=FLOOR))[1] - 1)

    def at(self, t: float, who: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Where they are predicted to be."""
        h, v, a, j = (t - self.t[who])[:, None], self.v[who], self.a[who], self.j[who]
        return self.x[who] + h * (v + h * (a / 2 + h * j / 6)), v + h * (a + h * j / 2)

    def next(self) -> float:
        """When somebody is due."""
        return float((self.t + self.h).min()) if len(self.t) else math.inf

    def advance(self, t: float, of: Field) -> None:
        """Bring those that are due at ``t`` there."""
        who = (self.t + self.h == t).nonzero()[:, 0]
        (x, v), a0, j0, h = self.at(t, who), self.a[who], self.j[who], self.h[who][:, None]
        a, j = torch.split(of(who, x, v), 3, 1)
        second = (-6 * (a0 - a) - h * (4 * j0 + 2 * j)) / h**2
        third = (12 * (a0 - a) + 6 * h * (j0 + j)) / h**3
        self.x[who], self.v[who] = x + h**4 * (second / 24 + h * third / 120), v + h**3 * (second / 6 + h * third / 24)
        self.a[who], self.j[who], self.t[who] = a, j, t
        self.count[0] += len(who)
        if self.eta is not None:  # Aarseth's criterion; steps double where they stay on the grid of doubled ones
            n = [each.norm(dim=1) for each in (a, j, second + h * third, third)]
            wanted = (self.eta * (n[0] * n[2] + n[1] ** 2) / (n[1] * n[3] + n[2] ** 2)).sqrt()
            double = torch.where(torch.remainder(self.t[who], 2 * h[:, 0]) == 0, 2, 1) * h[:, 0]
            self.h[who] = torch.minimum(self._power(wanted), double)


class Cluster:
    """Stars of ``mass``, float64 [stars], and particles without; NybbleError: what no cluster can be.

    ``frozen``: stars stay where they start, so that each particle's energy is conserved.
    """

    def __init__(
        self, mass: Tensor, stars: Bodies, particles: Bodies, softening: float, formats: forces.Formats,
        frozen: bool = False,
    ) -> None:  # fmt: skip
        start.check(mass, softening, stars.x, stars.v, particles.x, particles.v)
        self.mass, self.stars, self.particles, self.softening, self.t = mass, stars, particles, softening, 0.0
        self.moving: list[tuple[Bodies, Field]] = [
            (stars, lambda who, x, v: forces.exact(x, v, self.sources(), softening, own=who)[:, :6]),
            (particles, lambda _, x, v: forces.rounded(x, v, self.sources(), softening, formats)),
        ][frozen:]
        stars.v *= not frozen
        for bodies, of in self.moving:
            bodies.begin(of)

    def sources(self) -> tuple[Tensor, Tensor, Tensor]:
        """Stars as forces take them, now."""
        return (*self.stars.at(self.t), self.mass)

    def run(self, until: float) -> None:
        """Bring everybody to a time, a multiple of the longest steps (UsageError: it isn't)."""
        if any(until % bodies.most for bodies, _ in self.moving):
            raise UsageError(f"{until} is no multiple of the longest steps; take powers of two.")
        while (now := min(bodies.next() for bodies, _ in self.moving)) <= until:
            self.t = now
            for bodies, of in self.moving:
                if bodies.next() == now:
                    bodies.advance(now, of)
        self.t = until

    def energies(self) -> tuple[Tensor, Tensor]:
        """Of each star and each particle in the field of the (other) stars, for a unit of its mass; float64."""
        found, own = [], torch.arange(len(self.mass), device=self.mass.device)
        for b, who in ((self.stars, own), (self.particles, None)):
            phi = forces.exact(b.x, b.v, self.sources(), self.softening, who)[:, 6]
            found.append(b.v.square().sum(1) / 2 + phi)
        return found[0], found[1]
