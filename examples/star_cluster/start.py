"""Where a cluster starts: a Plummer sphere in N-body units (G = M = 1, E = -1/4; Heggie and Mathieu 1986)."""

import math

import torch
from torch import Tensor

from nybble.core.errors import DataError, UsageError
from nybble.core.seeds import generator

PLUMMER, FARTHEST = 3 * math.pi / 16, 20.0  # 1.305 times the first holds half the mass
LIGHT, BREAK, HEAVY, P, Q = 0.08, 0.5, 50.0, 1 - 1.3, 1 - 2.3  # Kroupa 2001: dN/dm ~ m^(P-1) to the break, then m^(Q-1)


def plummer(count: int, seed: int, name: str, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Positions and velocities, float64 [count, 3], drawn on the CPU as Aarseth, Henon and Wielen 1974 do.

    ``name``: "stars" and "particles" share no random number. ``scale``: of radii; speeds stay in balance with it.
    """
    draw = generator(seed, "star cluster", name)
    inside = torch.rand(count, dtype=torch.float64, generator=draw) * (1 + (PLUMMER / FARTHEST) ** 2) ** -1.5
    r = PLUMMER / (inside.clamp(min=1e-12) ** (-2 / 3) - 1).sqrt()
    q = torch.empty(0, dtype=torch.float64)
    while len(q) < count:  # speeds, as a share of the escape speed, by rejection; 0.1 is above the largest density
        tried, y = torch.rand(2, 4 * count + 64, dtype=torch.float64, generator=draw)
        q = torch.cat([q, tried[y * 0.1 < tried**2 * (1 - tried**2) ** 3.5]])
    speed = q[:count] * math.sqrt(2) * (r * r + PLUMMER**2) ** -0.25
    return _turned(r * scale, draw), _turned(speed / math.sqrt(scale), draw)


def _turned(length: Tensor, draw: torch.Generator) -> Tensor:
    """Vectors in all directions alike."""
    z, angle = 2 * torch.rand(2, len(length), dtype=torch.float64, generator=draw) - 1
    flat, angle = (1 - z * z).sqrt(), math.pi * angle
    return torch.stack([flat * angle.cos(), flat * angle.sin(), z], 1) * length[:, None]


def masses(count: int, seed: int, kind: str = "equal") -> Tensor:
    """float64 [count], 1 together: "equal" or "kroupa". UsageError: no such kind, or no stars."""
    if kind not in ("equal", "kroupa") or count < 1:
        raise UsageError(f"{count} stars with {kind!r} masses; a cluster has 1 or more, equal or kroupa.")
    if kind == "equal":
        return torch.full((count,), 1 / count, dtype=torch.float64)
    below, joined = (BREAK**P - LIGHT**P) / P, BREAK ** (P - Q)  # the density is continuous at the break
    u = torch.rand(count, dtype=torch.float64, generator=generator(seed, "star cluster", "masses"))
    u = u * (below + (HEAVY**Q - BREAK**Q) / Q * joined)
    low = (LIGHT**P + P * u.clamp(max=below)) ** (1 / P)
    found = torch.where(u < below, low, (BREAK**Q + Q * (u - below).clamp(min=0) / joined) ** (1 / Q))
    return found / found.sum()


def check(mass: Tensor, softening: float, *vectors: Tensor) -> None:
    """Refuse what no cluster can be: UsageError of the request, DataError of its numbers."""
    if not len(mass) or not 0 <= softening < math.inf:
        raise UsageError(f"{len(mass)} stars, softening {softening}; one star or more, and a length: zero or more.")
    names = ("mass", "star", "star's velocity", "particle", "particle's velocity")
    for name, values in zip(names, (mass, *vectors), strict=True):
        if not bool(values.isfinite().all()):
            raise DataError(f"{name} {int((~values.isfinite()).nonzero()[0, 0])} is not of finite numbers.")
    if bool((mass < 0).any()):
        raise DataError(f"star {int(mass.argmin())} has the mass {float(mass.min()):g}; masses are zero or more.")
