"""AdamW with a factored second moment: ``Factor4bit`` keeps little more than 4 bits for each weight.

Li, Chen & Zhu 2023, arXiv:2309.01507, section 4.3 ("4-bit Factor"); Shazeer & Stern 2018, arXiv:1804.04235 (factors).
"""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from nybble.optim import LowBitOptimizer
from nybble.optim._adam import moved
from nybble.optim._common import Common
from nybble.optim._decays import shrunk
from nybble.optim._factored import factor_shapes, mean_squares, outer
from nybble.optim._states import Kind
from nybble.optim.adamw import AdamWOptions

_LEAST = 2.0**-126  # float32's smallest normal number: where no row has had a gradient v is 0, not 0 / 0


class Factor(LowBitOptimizer):
    """AdamW, of whose second moment a matrix keeps the means of rows and of columns, in float32.

    ::

        p <- p (1 - lr wd);  m <- m + (1 - b1)(g - m)
        R <- b2 R + (1 - b2) row means of g^2;  C, of columns;  v = R C / mean(R)
        p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

    Vectors and scalars keep v itself, as AdamW does. Neither Adafactor's clipping nor its relative steps.

    Args:
        params: parameters, named parameters or groups, or a module.
        lr, betas, eps, weight_decay: :class:`~nybble.optim.adamw.AdamWOptions`; a group may have its own.
        common: :class:`~nybble.optim._common.Common`; the states are ``exp_avg`` (both signs), ``exp_avg_sq_row`` and
            ``exp_avg_sq_col`` (float32 unless a mapping says otherwise), or ``exp_avg_sq`` of vectors.
    """

    states: ClassVar[dict[str, Kind]] = {
        "exp_avg": "signed",
        "exp_avg_sq_row": "nonnegative",
        "exp_avg_sq_col": "nonnegative",
        "exp_avg_sq": "nonnegative",
    }
    factors: ClassVar[tuple[str, ...]] = ("exp_avg_sq_row", "exp_avg_sq_col")
    options_type: ClassVar[type[Any]] = AdamWOptions
    elementwise: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **common: Unpack[Common],
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options, **common)

    def shapes(self, p: Tensor, options: Any = None) -> dict[str, tuple[int, ...]]:  # noqa: D102
        shape = tuple(p.shape)
        if len(shape) < 2:
            return {"exp_avg": shape, "exp_avg_sq": shape}
        return {"exp_avg": shape, **dict(zip(self.factors, factor_shapes(shape), strict=True))}

    @staticmethod
    def update(  # noqa: D102
        p: Tensor, grad: Tensor, states: dict[str, Tensor], step: int, options: AdamWOptions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        beta1, beta2 = options.betas
        p = shrunk(p, options.lr, options.weight_decay)
        m = states["exp_avg"].lerp(grad, 1 - beta1)
        if p.dim() > 1:
            rows = states["exp_avg_sq_row"].lerp(mean_squares(grad, -1), 1 - beta2)
            columns = states["exp_avg_sq_col"].lerp(mean_squares(grad, -2), 1 - beta2)
            new, v = {"exp_avg_sq_row": rows, "exp_avg_sq_col": columns}, outer(rows, columns, _LEAST)
        else:
            v = (states["exp_avg_sq"] * beta2).addcmul_(grad, grad, value=1 - beta2)
            new = {"exp_avg_sq": v}
        return moved(p, m, v, step, options), {"exp_avg": m, **new}


PART = Factor
