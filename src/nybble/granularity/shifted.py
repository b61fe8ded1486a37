"""``shifted[=bits]``: one scale for all, times a power of two ``2^-s_j`` for each index of the last dimension.

LLM-FP4's pre-shifted exponent bias (Liu et al. 2023, arXiv:2310.16836, eq. 10-12): the exponents can move from an
activation to the weight that it meets, so a product of two such tensors needs one scale. Loud columns get s_j = 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from nybble.core.arithmetic import divided
from nybble.core.errors import GranularityError, SchemeError
from nybble.granularity import Granularity, Grid
from nybble.granularity._cut import need_dims, whole_numbers

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Shifted(Granularity):
    """One scale for all, times a power of two for each index of the last dimension.

    Args:
        bits: of a shift, 0 <= s_j < 2^bits; 0 takes as many as the format has exponent bits, as the paper does.
    """

    bits: int = 0

    word: ClassVar[str] = "shifted"
    example: ClassVar[str] = "shifted"
    for_products: ClassVar[bool] = False
    calibrated_on: ClassVar[str] = "columns"
    combine: ClassVar[str] = "product"
    factors_are: ClassVar[str] = "column maxima"
    stored: ClassVar[Mapping[str, str]] = {"shifts": "uint8"}

    def __post_init__(self) -> None:
        if not 0 <= self.bits <= 5:
            raise GranularityError(f"shifted={self.bits}: a shift has 1 to 5 bits (or leave the number out).")

    @classmethod
    def parse(cls, value: str, options: Mapping[str, str]) -> Self:  # noqa: D102
        (bits,) = whole_numbers(cls.word, "0" if value == "true" else value or "0", "shifted, shifted=3")
        return cls(bits)

    def __str__(self) -> str:
        return f"shifted={self.bits}" if self.bits else "shifted"

    # ------------------------------------------------------------------------------------------------ blocks
    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:  # noqa: D102
        need_dims(self, shape, 1)
        return (1,) * len(shape)

    def to_blocks(self, x: Tensor) -> Tensor:
        """Rows of the last dimension, which the columns' factors meet."""
        need_dims(self, x.shape, 1)
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])

    def from_blocks(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: D102
        return blocks.reshape(tuple(shape))

    def expand(self, scale: Tensor, shape: Sequence[int]) -> Tensor:
        """The tensor's factor, or the columns'."""
        return scale.reshape(*(1,) * (len(shape) - 1), scale.numel())

    def factor_blocks(self, scale: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: D102
        return scale.expand(*(1,) * (len(shape) - 1), shape[-1]).reshape(1, -1)

    # ------------------------------------------------------------------------------------------------ factors
    @property
    def searchable(self) -> bool:
        """Through the largest value that the scale can hold, from which the shifts follow."""
        return True

    def check_format(self, fmt: Grid) -> None:  # noqa: D102
        self.limit(fmt)

    def limit(self, fmt: Grid) -> int:
        """Largest shift: of 0 bits, what the format's exponent can hold, 2^e - 1 (INT4 is E1M2: e = 1).

        Raises:
            SchemeError: the format has no exponent, and no bits were given.
        """
        bits = self.bits or fmt.exponent_bits
        if bits is None:
            raise SchemeError(
                f"shifted columns: {fmt.name} has no exponent to take the shifts' width from; say shifted=3."
            )
        return int(2**bits - 1)

    def summary(self, x: Tensor) -> Tensor:
        """Largest magnitude of each column, [columns]."""
        magnitude = x.abs()
        return magnitude if x.dim() == 1 else magnitude.reshape(-1, x.shape[-1]).amax(0)

    def fit_factors(self, x: Tensor, fmt: Grid, fraction: Tensor | None = None) -> tuple[Tensor, ...]:
        """The scale of the loudest column, or of a fraction of it, and 2^-s_j for each column."""
        import torch

        columns, limit = self.summary(x), self.limit(fmt)
        top = columns.max().reshape(1)
        if fraction is None:
            shifts = column_shifts(columns, top, limit)
            if fmt.has_zero:
                top = torch.where(top == 0, torch.full_like(top, fmt.absmax), top)
            scale = divided(top, fmt.absmax)
        else:
            top = top * fraction
            if fmt.has_zero:
                top = torch.where(top == 0, torch.ones_like(top), top)
            shifts = column_shifts(columns, top, limit)
            least = shifts.min()  # one column at least has no shift: what all share belongs to the scale
            scale = divided(top * torch.exp2(-least), fmt.absmax)
            shifts = shifts - least
        ones = (1,) * (x.dim() - 1)
        return scale.reshape(*ones, 1), torch.exp2(-shifts).reshape(*ones, -1)

    def store(self, factors: Sequence[Tensor]) -> dict[str, Tensor]:  # noqa: D102
        import torch

        scale, powers = factors
        return {"scale": scale.reshape(1), "shifts": powers.reshape(-1).log2().neg().to(torch.uint8)}

    def restore(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, ...]:  # noqa: D102
        import torch

        return parts["scale"], torch.exp2(-parts["shifts"].float())


def column_shifts(columns: Tensor, top: Tensor, limit: int) -> Tensor:
    """Integer shifts of LLM-FP4's pre-shifted exponent bias: ``s_j = clip(round(log2(top / max|x_j|)), 0, limit)``.

    Liu et al. 2023, arXiv:2310.16836, eq. 10-12, with rho and b_j written as largest values instead of biases.

    Args:
        columns: float32 [columns], largest magnitude of each; a column of zeros gets ``limit``.
        top: float32, one element: the largest value that the tensor's own scale can hold.
        limit: the largest shift.

    Returns:
        float32 [columns].
    """
    return (top / columns).log2().round().nan_to_num(nan=0.0, posinf=limit).clamp(0, limit)


PART = Shifted
