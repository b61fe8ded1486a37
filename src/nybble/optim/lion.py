"""Lion: the sign of an interpolated momentum, which is kept in few bits between steps.

Chen et al. 2023, arXiv:2302.06675, program 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from nybble.optim import LowBitOptimizer, check_range
from nybble.optim._common import Common
from nybble.optim._decays import shrunk
from nybble.optim._states import Kind


@dataclass(frozen=True, kw_only=True)
class LionOptions:
    """``lr`` >= 0, ``betas`` in [0, 1), ``weight_decay`` >= 0 (a share of ``lr`` per step)."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_range("lr", self.lr)
        check_range("betas", self.betas, count=2, below=1.0)
        check_range("weight_decay", self.weight_decay)


class Lion(LowBitOptimizer):
    """Lion, whose momentum is kept by a Quantizer.

    ::

        p <- p (1 - lr wd) - lr sign(b1 m + (1 - b1) g);  m <- b2 m + (1 - b2) g

    With ``state=None`` every step equals bitsandbytes' ``Lion32bit`` bit for bit on float32 parameters.

    Args:
        params: parameters, named parameters or groups, or a module.
        lr, betas, weight_decay: :class:`LionOptions`; a group may have its own.
        common: :class:`~nybble.optim._common.Common`; the state is ``exp_avg``, of both signs. ``keep_sign=True`` keeps
            a small momentum's direction.
    """

    states: ClassVar[dict[str, Kind]] = {"exp_avg": "signed"}
    options_type: ClassVar[type[Any]] = LionOptions

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, **common)

    @staticmethod
    def update(  # noqa: D102
        p: Tensor, grad: Tensor, states: dict[str, Tensor], step: int, options: LionOptions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        beta1, beta2 = options.betas
        p = shrunk(p, options.lr, options.weight_decay)
        direction = states["exp_avg"].mul(beta1).add_(grad, alpha=1 - beta1).sign_()
        m = states["exp_avg"].mul(beta2).add_(grad, alpha=1 - beta2)
        return p.add(direction, alpha=-options.lr), {"exp_avg": m}


PART = Lion
