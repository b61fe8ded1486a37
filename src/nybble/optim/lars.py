"""LARS: SGD with a momentum, whose step is at most a share of the weight's norm; the momentum in few bits.

You, Gitman & Ginsburg 2017, arXiv:1708.03888 (layer-wise rates), as bitsandbytes clips them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from nybble.optim import check_range
from nybble.optim._common import Common
from nybble.optim._momentum import MomentumOptions, MomentumRule, momentum_step
from nybble.optim._norms import clipped


@dataclass(frozen=True, kw_only=True)
class LARSOptions(MomentumOptions):
    """As SGD's, and ``max_unorm`` >= 0: the largest norm of a direction for each unit of the weight's; 0 for any."""

    max_unorm: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("max_unorm", self.max_unorm)


class LARS(MomentumRule):
    """bitsandbytes' ``LARS``: SGD's direction u, shortened to ``max_unorm * |p|`` where it is longer.

    ::

        g <- g + wd p;  b <- g at the first step, then  momentum b + (1 - dampening) g;  u = b, or g + momentum b
        p <- p - lr min(1, max_unorm |p| / |u|) u

    The paper scales gradients, up as well as down, before they enter the momentum. With ``state=None`` and a momentum
    this equals bitsandbytes' ``PytorchLARS`` bit for bit on float32 parameters; their 8-bit LARS leaves the norms out
    and is plain SGD, ours is not. A weight of zeros never moves while ``max_unorm`` is on.

    Args:
        params: parameters, named parameters or groups, or a module.
        lr, momentum, dampening, weight_decay, nesterov, max_unorm: :class:`LARSOptions`; a group may have its own.
        common: :class:`~nybble.optim._common.Common`; the state is ``momentum_buffer``, of both signs.
    """

    options_type: ClassVar[type[Any]] = LARSOptions
    elementwise: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
        **common: Unpack[Common],
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "dampening": dampening}
        options |= {"weight_decay": weight_decay, "nesterov": nesterov, "max_unorm": max_unorm}
        super().__init__(params, options, **common)

    @staticmethod
    def update(  # noqa: D102
        p: Tensor, grad: Tensor, states: dict[str, Tensor], step: int, options: LARSOptions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        direction, new = momentum_step(p, grad, states, step, options)
        scale = clipped(p, direction, options.max_unorm)
        return p.add(direction, alpha=float(-options.lr * scale)), new


PART = LARS
