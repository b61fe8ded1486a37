"""Adafactor: no momentum, and of a matrix's second moment only the means of rows and columns.

Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 and 5; ``lr`` bounds the relative step, as in torch's.
"""

from __future__ import annotations

import numbers
import operator
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from nybble.core.errors import UsageError
from nybble.optim import LowBitOptimizer, check_range
from nybble.optim._common import Common
from nybble.optim._decays import shrunk
from nybble.optim._factored import factor_shapes, mean_squares, outer
from nybble.optim._states import Kind


@dataclass(frozen=True, kw_only=True)
class AdafactorOptions:
    """``lr`` >= 0, ``beta2_decay`` <= 0, ``eps`` >= 0 (the first may be None), ``d`` >= 1, ``weight_decay`` >= 0."""

    lr: float = 1e-2
    beta2_decay: float = -0.8
    eps: tuple[float | None, float] = (None, 1e-3)
    d: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_range("lr", self.lr)
        check_range("weight_decay", self.weight_decay)
        given_eps: Any = self.eps
        first, *rest = given_eps if isinstance(given_eps, tuple | list) and given_eps else (given_eps,)
        check_range("eps (of which the first may be None)", (0.0 if first is None else first, *rest), count=2)
        for name, bound, fits in (("beta2_decay", "<= 0", operator.le), ("d", ">= 1", operator.ge)):
            given: object = getattr(self, name)
            if not isinstance(given, numbers.Real) or not fits(given, int(bound[-1])):
                raise UsageError(f"{name} is a number {bound}; got {given!r}.")


class Adafactor(LowBitOptimizer):
    """``torch.optim.Adafactor``; means of rows and columns stay float32, a vector's second moment has a Quantizer.

    ::

        beta = 1 - t^beta2_decay;  a = max(eps2, rms(p)) min(lr, 1 / sqrt(t))
        p <- p (1 - lr wd);  R <- beta R + (1 - beta) row means of g^2;  C, of columns;  V = R C / max(mean(R), eps1)
        u = g / sqrt(max(V, eps1^2));  p <- p - a u / max(1, rms(u) / d)

    Dimensions before the last two are so many matrices. With ``state=None`` every step equals
    ``torch.optim.Adafactor(foreach=False)`` bit for bit on float32 parameters. An ``eps1`` of None is float32's 2**-23
    whatever the parameter's dtype. A tensor without elements, by whose number torch's divides, is left alone.

    Args:
        params: parameters, named parameters or groups, or a module.
        lr, beta2_decay, eps, d, weight_decay: :class:`AdafactorOptions`; a group may have its own.
        common: :class:`~nybble.optim._common.Common`; the states are ``row_var`` and ``col_var``, float32 unless a
            mapping says otherwise, or ``variance`` of vectors and scalars. None is ever negative.
    """

    states: ClassVar[dict[str, Kind]] = {
        "row_var": "nonnegative",
        "col_var": "nonnegative",
        "variance": "nonnegative",
    }
    factors: ClassVar[tuple[str, ...]] = ("row_var", "col_var")
    options_type: ClassVar[type[Any]] = AdafactorOptions
    elementwise: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        options = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay}
        super().__init__(params, {**options, "maximize": False}, **common)  # torch's reads it from a saved group

    def shapes(self, p: Tensor, options: Any = None) -> dict[str, tuple[int, ...]]:  # noqa: D102
        shape = tuple(p.shape)
        return dict(zip(self.factors, factor_shapes(shape), strict=True)) if len(shape) > 1 else {"variance": shape}

    @staticmethod
    def update(  # noqa: D102
        p: Tensor, grad: Tensor, states: dict[str, Tensor], step: int, options: AdafactorOptions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if p.numel() == 0:
            return p.clone(), {name: x.clone() for name, x in states.items()}
        eps1 = torch.finfo(torch.float32).eps if options.eps[0] is None else options.eps[0]
        fresh = float(step) ** options.beta2_decay
        rate = max(options.eps[1], p.norm(2).item() / p.numel() ** 0.5) * min(options.lr, 1 / float(step) ** 0.5)
        p = shrunk(p, options.lr, options.weight_decay)
        if p.dim() > 1:
            rows = states["row_var"].lerp(mean_squares(grad, -1), fresh)
            columns = states["col_var"].lerp(mean_squares(grad, -2), fresh)
            new, variance = {"row_var": rows, "col_var": columns}, outer(rows, columns, eps1)
        else:
            v = states["variance"].lerp(grad * grad, fresh)
            new, variance = {"variance": v}, v.clone()
        update = variance.clamp_(min=eps1 * eps1).rsqrt_().mul_(grad)
        denominator = max(1.0, update.norm(2).item() / (update.numel() ** 0.5 * options.d))
        return p.add(update, alpha=-rate / denominator), new


PART = Adafactor
