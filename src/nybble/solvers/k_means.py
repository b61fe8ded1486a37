"""Vector quantization: runs of d neighbouring weights become entries of one code book per matrix, found by k-means.

Each row is cut along its inputs into runs of ``width`` weights; all runs of a matrix share ``entries`` code words:
log2(entries) / width bits a weight (of more than 256 entries: 16 / width), and the book. With D = diag E[x x^T] of the
inputs, k-means minimises

    sum over rows r and columns c   D_c (W_rc - W_hat_rc)^2

that is the layer's output error without the products of different inputs; without calibration D = 1 and it is plain
k-means, the first step of VQ4DiT (Deng et al. 2024, arXiv:2408.17131; (256, 4) there is 2 bits, (64, 2) 3 bits) and of
most methods with code books of vectors (weighted as in GPTVQ, van Baalen et al. 2024, arXiv:2402.15319).

Lloyd's iterations from k-means++ seeds (Arthur & Vassilvitskii 2007), drawn from an evenly spread sample of 64 runs for
each entry. An entry that no run chose is moved to the run with the largest error. Both steps only lower the sum. The
book is then rounded to float16 and every run assigned once more, to what is stored. A matrix with few runs gets a
smaller book: the largest power of two not above a quarter of its runs, as VQ4DiT does.

Where the scheme's own quantizer has the smaller output error (products of inputs included), its round-to-nearest is
kept, and the report says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.calibration.error import input_energy, relative_error
from nybble.core.errors import SchemeError
from nybble.core.seeds import generator
from nybble.qtensor.vector import CHUNK, VectorQTensor, VectorQuantizer, divisor, nearest, rows_at_once
from nybble.quantizer import Quantizer
from nybble.solvers import Solved, Solver, Stats, Weight

SAMPLE = 64
"""Runs that seeds are drawn from, for each entry."""


@dataclass(frozen=True, kw_only=True)
class KMeans(Solver):
    """Options of the method.

    Attributes:
        entries: of the code book, 2 to 65,536; of a power of two no bit is idle.
        width: neighbouring weights of a row that share an index; divides the columns.
        iterations: of Lloyd's algorithm at most (VQ4DiT: 100).
        tolerance: stop when an iteration lowers the error by less than this share.
        channel: divide every row by its root mean square first and keep that as a float16 scale.
        weighted: D of the inputs, as above; without it D = 1 whatever the calibration.
        seed: of the first entries.
    """

    entries: int = 256
    width: int = 2
    iterations: int = 100
    tolerance: float = 1e-3
    channel: bool = False
    weighted: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        VectorQuantizer(k=self.entries, d=self.width)
        if self.iterations < 1:
            raise SchemeError(f"k-means: iterations={self.iterations}; at least one.")
        if not 0 <= self.tolerance < 1:
            raise SchemeError(f"k-means: tolerance={self.tolerance:g} is a share of the error, 0 <= tolerance < 1.")

    def needs(self, inputs: Quantizer | None) -> frozenset[str]:  # noqa: D102
        return frozenset({"second_moment"} if self.weighted else ())

    @property
    def vectors(self) -> VectorQuantizer:  # noqa: D102
        return VectorQuantizer(k=self.entries, d=self.width, channel=self.channel)

    def check_shape(self, rows: int, columns: int) -> None:  # noqa: D102
        VectorQuantizer(k=self.entries, d=self.width).check((rows, columns))

    def stored_bytes(self, quantizer: Quantizer, shape: tuple[int, int]) -> float:
        """Indices, the book, and the rows' scales."""
        indices = -(-shape[0] * (shape[1] // self.width) * (self.entries - 1).bit_length() // 8)
        return indices + 2 * self.entries * self.width + (2 * shape[0] if self.channel else 0)

    def working_bytes(self, rows: Sequence[int], columns: int) -> int:
        """The weights, six copies of the largest (runs, importance, products), and distances (on a GPU twice)."""
        return 4 * columns * (sum(rows) + 6 * max(rows)) + 8 * CHUNK

    def flops(self, rows: int, columns: int, tokens: int, inputs: Quantizer | None) -> float:
        """A product of 2 d numbers with the book for every run, and three looks at the distances; about 25 times."""
        return min(self.iterations, 25) * self.entries * rows * columns * (4 + 3 / self.width)

    def solve(self, weights: Sequence[Weight], stats: Stats) -> list[Solved]:  # noqa: D102
        return [self._solve(weight, stats.second_moment if self.weighted else None) for weight in weights]

    def _solve(self, weight: Weight, second: Tensor | None) -> Solved:
        matrix = weight.matrix
        plain = weight.quantizer.quantize(matrix)
        plain_error = relative_error(matrix, plain.dequantize(), second)
        found = self._clustered(matrix, input_energy(second, len(matrix)), weight.name)
        error = relative_error(matrix, found.dequantize(), second)
        if not error <= plain_error:
            note = f"worse than {weight.quantizer} ({error:.3g} > {plain_error:.3g}): kept the latter"
            return Solved(weight=plain, error=plain_error, rtn_error=plain_error, notes=(note,))
        stored = VectorQuantizer(k=len(found.codebook), d=self.width, channel=self.channel)
        notes = () if stored.k == self.entries else (f"few runs: {stored.k} entries instead of {self.entries}",)
        return Solved(weight=found, error=error, rtn_error=plain_error, stored=stored, notes=notes)

    def _clustered(self, matrix: Tensor, energy: Tensor | None, name: str) -> VectorQTensor:
        """The best code book for ``sum energy (matrix - scale * entry)^2``."""
        scale = row_scale(matrix) if self.channel else None
        importance = torch.ones_like(matrix) if energy is None else floored(energy).expand_as(matrix)
        runs, weights = matrix.reshape(-1, self.width), importance.reshape(-1, self.width)
        if scale is not None:
            runs = (matrix / divisor(scale)).reshape(-1, self.width)
            weights = (importance * scale.float().square()).reshape(-1, self.width)
        entries = min(self.entries, max(2, 1 << max(0, (len(runs) // 4).bit_length() - 1)))
        stride = max(1, -(-len(runs) // (SAMPLE * entries)))
        # On the CPU: a GPU's running sums are not repeatable, and the sample is small.
        draws = torch.rand(entries, dtype=torch.float64, generator=generator(self.seed, name, "k-means"))
        book = seeds(runs[::stride].cpu(), weights[::stride].cpu(), draws).to(runs.device)
        book = stored_book(lloyd(runs, weights, book, self.iterations, self.tolerance)[0])
        quantizer = VectorQuantizer(k=entries, d=self.width, channel=self.channel)
        return quantizer.quantize(matrix, book, scale, importance)


def row_scale(matrix: Tensor) -> Tensor:
    """Root mean square of each row, float16 [rows, 1]; 0 only for a row of zeros, which stays one."""
    root = matrix.square().mean(1, keepdim=True).sqrt()
    smallest = torch.finfo(torch.float16).tiny
    return torch.where(root == 0, root, root.clamp(min=smallest)).half()


def floored(energy: Tensor) -> Tensor:
    """Energies with inputs that (almost) never speak raised to a ten-thousandth of the mean, so that 0/0 can't be."""
    mean = float(energy.mean())
    return energy.clamp(min=1e-4 * mean) if mean > 0 else torch.ones_like(energy)


def stored_book(book: Tensor) -> Tensor:
    """As float16 where it has its eleven bits for the large entries; float32 for weights tiny or huge throughout."""
    top = float(book.abs().max())
    return book.half() if 2.0**-8 <= top <= 65504 else book


def seeds(runs: Tensor, weights: Tensor, draws: Tensor) -> Tensor:
    """k-means++: each entry is a run drawn in proportion to its weighted distance from the nearest entry before it.

    Args:
        runs: float32 [n, d].
        weights: of their elements, the same.
        draws: float64 [entries], uniform in 0 .. 1.

    Returns:
        float32 [entries, d]; where fewer runs differ, entries repeat.
    """
    book = torch.empty(len(draws), runs.shape[1], dtype=torch.float32, device=runs.device)
    chance = weights.sum(1).double()
    nearest: Tensor | None = None
    for i in range(len(draws)):
        total = chance.cumsum(0)
        # Once all runs are entries every chance is 0: the search then ends past the last run.
        at = torch.searchsorted(total, (draws[i] * total[-1]).reshape(1), right=True).clamp_(max=len(runs) - 1)
        book[i] = runs[at[0]]
        distance = (weights * (runs - book[i]).square()).sum(1)
        nearest = distance if nearest is None else torch.minimum(nearest, distance)
        chance = nearest.double()
    return book


def lloyd(runs: Tensor, weights: Tensor, book: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, list[float]]:
    """Lloyd's algorithm under a weighted squared distance.

    Args:
        runs: float32 [n, d].
        weights: of their elements, > 0, the same.
        book: the first entries, float32 [k, d].
        iterations: at most.
        tolerance: stop when the error falls by a smaller share.

    Returns:
        the entries, and the error ``sum weights (runs - nearest entry)^2`` before each update of them.
    """
    errors: list[float] = []
    for _ in range(iterations):
        sums, mass, error = _assign(runs, weights, book)
        errors.append(float(error.double().sum()))
        if len(errors) > 1 and errors[-2] - errors[-1] <= tolerance * errors[-2]:
            break
        empty = mass.amax(1) == 0
        book = torch.where(empty[:, None], book, (sums / mass.clamp(min=torch.finfo(torch.float32).tiny)))
        count = int(empty.sum())
        if count:
            book[empty] = runs[error.topk(count).indices]
    return book, errors


def _assign(runs: Tensor, weights: Tensor, book: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sums and weights of the runs that chose each entry, float32 [k, d] twice; the error of each run, [n]."""
    index = nearest(runs, book, weights)
    both = _summed(torch.cat([weights * runs, weights], 1), index, len(book))
    sums, mass = torch.split(both.float(), runs.shape[1], 1)
    return sums, mass, (weights * (runs - book[index]).square()).sum(1)


def _summed(values: Tensor, index: Tensor, entries: int) -> Tensor:
    """The sum of the rows of each index, float64 [entries, ...]; repeatable, as adding by index on a GPU is not."""
    if not values.is_cuda:
        return torch.stack([torch.bincount(index, column, entries) for column in values.double().unbind(1)], 1)
    total = torch.zeros(entries, values.shape[1], dtype=torch.float64, device=values.device)
    rows = rows_at_once(entries)
    for part, at in zip(torch.split(values, rows), torch.split(index, rows), strict=True):
        total += (
            torch.zeros(entries, len(part), dtype=torch.float32, device=values.device).scatter_(0, at[None], 1.0) @ part
        )
    return total


PART = KMeans
