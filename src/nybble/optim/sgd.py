"""SGD with its momentum in few bits between steps.

Polyak 1964 (momentum); Sutskever et al. 2013 (Nesterov's); Dettmers et al. 2022, arXiv:2110.02861 (8-bit momentum).
"""

from __future__ import annotations

from typing import ClassVar, Unpack

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from nybble.optim._common import Common
from nybble.optim._momentum import MomentumOptions, MomentumRule, momentum_step


class SGD(MomentumRule):
    """``torch.optim.SGD`` whose momentum is kept by a Quantizer; without a momentum there is no state.

    ::

        g <- g + wd p;  b <- g at the first step, then  momentum b + (1 - dampening) g
        p <- p - lr (g + momentum b if nesterov else b)

    With ``state=None`` every step equals ``torch.optim.SGD(foreach=False)`` bit for bit on float32 parameters. Unlike
    torch's, a momentum that a schedule turns on later begins at (1 - dampening) g; one that is turned off is forgotten.

    Args:
        params: parameters, named parameters or groups, or a module.
        lr, momentum, dampening, weight_decay, nesterov: :class:`~nybble.optim._momentum.MomentumOptions`; a group may
            have its own.
        common: :class:`~nybble.optim._common.Common`; the state is ``momentum_buffer``, of both signs.
    """

    counts: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **common: Unpack[Common],
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "dampening": dampening}
        options |= {"weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, options, **common)

    @staticmethod
    def update(  # noqa: D102
        p: Tensor, grad: Tensor, states: dict[str, Tensor], step: int, options: MomentumOptions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        direction, new = momentum_step(p, grad, states, step, options)
        return p.add(direction, alpha=-options.lr), new


PART = SGD
