"""``tensor``: what a format does to random numbers of a known distribution; no model is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nybble.core.errors import UsageError
from nybble.core.options import at_least_one
from nybble.lab.kinds import RunKind
from nybble.quantizer import Quantizer

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True, kw_only=True)
class DrawnTensor(RunKind):
    """Round to nearest.

    Attributes:
        weights: a quantizer line. distribution: of the values, variance 1; ``student-t`` has 5 degrees of freedom.
        rows, columns: of the matrix. seed: of the draw.
    """

    weights: str
    distribution: Literal["normal", "laplace", "uniform", "student-t"] = "normal"
    rows: int = 256
    columns: int = 1024
    seed: int = 0

    def check(self) -> None:
        """Make the quantizer, and cut a matrix of this size."""
        at_least_one(rows=self.rows, columns=self.columns)
        if why := _refusal(self.weights, self.rows, self.columns):
            raise UsageError(why)

    def run(self, folder: Path) -> Mapping[str, Any]:
        """``sqnr`` in dB, ``mse``, ``bits`` per value with scales."""
        import torch

        quantizer = Quantizer(self.weights)
        draws = torch.Generator().manual_seed(self.seed)
        x = _DRAWN[self.distribution](draws, self.rows, self.columns).float()
        found = quantizer.quantize(x)
        wrong = (found.dequantize() - x).double().square().mean().item()
        power = x.double().square().mean().item()
        return {
            "sqnr": 10 * math.log10(power / wrong) if wrong else math.inf,
            "mse": wrong,
            "bits": 8 * quantizer.stored_bytes((self.rows, self.columns)) / x.numel(),
        }


@lru_cache(4096)
def _refusal(line: str, rows: int, columns: int) -> str:
    """Why a line is none, or can't take a matrix of this shape; or nothing."""
    try:
        Quantizer(line).stored_bytes((rows, columns))
    except UsageError as error:
        return str(error)
    return ""


def _normal(draws: Generator, *shape: int) -> Tensor:
    import torch

    return torch.randn(shape, generator=draws, dtype=torch.float64)


def _uniform(draws: Generator, *shape: int) -> Tensor:
    import torch

    return (torch.rand(shape, generator=draws, dtype=torch.float64) - 0.5) * math.sqrt(12)


def _laplace(draws: Generator, *shape: int) -> Tensor:
    import torch

    drawn = torch.empty(2, *shape, dtype=torch.float64).exponential_(generator=draws)
    return (drawn[0] - drawn[1]) / math.sqrt(2)


def _student_t(draws: Generator, *shape: int) -> Tensor:
    import torch

    squares = torch.randn(5, *shape, generator=draws, dtype=torch.float64).square().sum(0)
    return _normal(draws, *shape) / (squares / 3).sqrt()  # over 5, times the root of the variance 5 / 3


_DRAWN: dict[str, Callable[..., Tensor]] = {
    "normal": _normal, "laplace": _laplace, "uniform": _uniform, "student-t": _student_t,
}  # fmt: skip

PART = DrawnTensor
