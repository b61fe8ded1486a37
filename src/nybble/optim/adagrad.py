"""Adagrad with its sum of squares in few bits between steps.

Duchi, Hazan & Singer 2011, "Adaptive Subgradient Methods", figure 1 (diagonal).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from nybble.optim import LowBitOptimizer, check_range
from nybble.optim._common import Common
from nybble.optim._decays import with_decay
from nybble.optim._states import Kind


@dataclass(frozen=True, kw_only=True)
class AdagradOptions:
    """All >= 0: ``lr``, ``lr_decay``, ``weight_decay``, ``initial_accumulator_value``, ``eps``."""

    lr: float = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    def __post_init__(self) -> None:
        for name in ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"):
            check_range(name, getattr(self, name))


class Adagrad(LowBitOptimizer):
    """``torch.optim.Adagrad`` whose sum of squares is kept by a Quantizer.

    ::

        g <- g + wd p;  s <- s + g^2;  p <- p - lr / (1 + (t - 1) lr_decay) * g / (sqrt(s) + eps)

    The sum starts at ``initial_accumulator_value``. With ``state=None`` every step equals
    ``torch.optim.Adagrad(foreach=False)`` bit for bit on float32 parameters. A sum only grows: once it is some hundred
    times a step's square, nearest rounding in few bits loses what is added; ``rounding=stochastic`` keeps its mean.

    Args:
        params: parameters, named parameters or groups, or a module.
        lr, lr_decay, weight_decay, initial_accumulator_value, eps: :class:`AdagradOptions`; a group may have its own.
        common: :class:`~nybble.optim._common.Common`; the state is ``sum``, never negative.
    """

    states: ClassVar[dict[str, Kind]] = {"sum": "nonnegative"}
    options_type: ClassVar[type[Any]] = AdagradOptions

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        **common: Unpack[Common],
    ) -> None:
        options = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, {**options, "initial_accumulator_value": initial_accumulator_value}, **common)

    @staticmethod
    def update(  # noqa: D102
        p: Tensor, grad: Tensor, states: dict[str, Tensor], step: int, options: AdagradOptions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        grad = with_decay(grad, p, options.weight_decay)
        before = states["sum"] + options.initial_accumulator_value if step == 1 else states["sum"]
        total = before.addcmul(grad, grad)
        rate = options.lr / (1 + (step - 1) * options.lr_decay)
        return p.addcdiv(grad, total.sqrt().add_(options.eps), value=-rate), {"sum": total}


PART = Adagrad
