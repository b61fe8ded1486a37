"""Low-rank compensation (LoRC): two thin matrices that make up for the largest part of a weight's rounding error.

Yao et al. 2023 (ZeroQuant-V2), arXiv:2303.08302; with floating-point weights Wu et al. 2023 (ZeroQuant-FP),
arXiv:2307.09782. With ``E = W - W_hat = U S V^T``,

    A = U_m S_m^(1/2)      B = S_m^(1/2) V_m^T      the layer computes with W_hat + A B

W_hat is final: this comes after every solver and reconstruction. A and B are stored in 16 bits, or rounded themselves;
a layer that comes out worse for it than it was keeps its weight, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.calibration.error import relative_error
from nybble.calibration.window import Window
from nybble.core.errors import SchemeError
from nybble.corrections import Correction
from nybble.nn.kinds import Target
from nybble.nn.layer import QuantLayer
from nybble.nn.packed import Packed
from nybble.qtensor import QTensor
from nybble.qtensor.low_rank_sum import LowRankSum
from nybble.quantizer import Quantizer
from nybble.rounding import get_rounding

PLAIN = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class LowRank(Correction):
    """Options of the method.

    Attributes:
        rank: m, of the two matrices; 0 does nothing.
        factors: how they are stored: float16, bfloat16, float32, or a quantizer line (``int8 channel``).
    """

    rank: int = 8
    factors: str = "float16"

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise SchemeError(f"low-rank: rank={self.rank}; it is 0 or more.")
        if self.factors not in PLAIN and get_rounding(Quantizer(self.factors).rounding).stochastic:
            raise SchemeError(f"low-rank: factors={self.factors} are drawn by chance; use rounding=nearest-even.")

    def can_take(self, target: Target) -> bool:  # noqa: D102
        return target.kind.shares_input and target.rule.weights is not None

    def check(self, target: Target) -> None:  # noqa: D102
        if self.rank > min(target.shape):
            raise SchemeError(
                f"low-rank: rank={self.rank}, and the weight is {target.shape[0]} x {target.shape[1]}; "
                f"take at most {min(target.shape)}, or leave it out with targets."
            )
        if self.factors not in PLAIN:
            granularity = Quantizer(self.factors).granularity
            for shape in ((target.shape[0], self.rank), (self.rank, target.shape[1])):
                granularity.check(shape)

    def run(self, window: Window, targets: Sequence[Target], path: str) -> None:  # noqa: D102
        for target in targets if self.rank else ():
            layer = window.block.installed(target)
            assert isinstance(layer, QuantLayer) and isinstance(layer.weight, Packed)
            truth, base = window.block.matrix(target).float(), layer.weight.qtensor()
            found = self._sum(truth, base)
            before = relative_error(truth, base.dequantize(), None)
            after = relative_error(truth, found.dequantize(), None)
            record = window.block.records[target.name]
            if after >= before:
                record.notes.append(f"rank {self.rank} would not lower its error ({before:.3g}): left out")
                continue
            layer.weight = Packed(found, layer.weight.dtype)
            record.changed = True
            record.notes.append(f"rank {self.rank} in {self.factors}: weight error {before:.3g} -> {after:.3g}")

    def _sum(self, truth: Tensor, base: QTensor) -> LowRankSum:
        u, s, v = torch.linalg.svd(truth - base.dequantize(), full_matrices=False)
        root = s[: self.rank].sqrt()
        a, b = (u[:, : self.rank] * root).contiguous(), (root[:, None] * v[: self.rank]).contiguous()
        if self.factors in PLAIN:
            dtype: torch.dtype = getattr(torch, self.factors)
            return LowRankSum(base, a.to(dtype), b.to(dtype))
        quantizer = Quantizer(self.factors)
        return LowRankSum(base, quantizer.quantize(a), quantizer.quantize(b))

    def flops(self, rows: int, columns: int) -> float:
        """Of a singular value decomposition, about 20 n m min(n, m)."""
        return 20.0 * rows * columns * min(rows, columns)

    def stored_bytes(self, rows: int, columns: int) -> float:  # noqa: D102
        if self.factors in PLAIN:
            return self.rank * (rows + columns) * float(getattr(torch, self.factors).itemsize)
        quantizer = Quantizer(self.factors)
        return sum(quantizer.stored_bytes(shape) for shape in ((rows, self.rank), (self.rank, columns)))

    def working_bytes(self, rows: int, columns: int) -> int:  # noqa: D102
        return 4 * (4 * rows * columns + 2 * min(rows, columns) * (rows + columns))


PART = LowRank
