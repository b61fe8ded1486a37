"""Adam with both moments in few bits between steps; the decay is part of the gradient.

Kingma & Ba 2015, arXiv:1412.6980, algorithm 1; Dettmers et al. 2022, arXiv:2110.02861 (8-bit states).
"""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from nybble.optim import LowBitOptimizer
from nybble.optim._adam import AdamOptions, adam_step
from nybble.optim._common import Common
from nybble.optim._decays import with_decay
from nybble.optim._states import Kind


class Adam(LowBitOptimizer):
    """``torch.optim.Adam`` whose moments are kept by Quantizers.

    ::

        g <- g + wd p;  m <- m + (1 - b1)(g - m);  v <- b2 v + (1 - b2) g^2
        p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

    With ``state=None`` every step equals ``torch.optim.Adam(foreach=False)`` bit for bit on float32 parameters.
    bitsandbytes' ``Adam`` decays as AdamW does; without a decay, the default, both are the same.

    Args:
        params: parameters, named parameters or groups, or a module.
        lr, betas, eps, weight_decay: :class:`~nybble.optim._adam.AdamOptions`; a group may have its own.
        common: :class:`~nybble.optim._common.Common`; the moments are ``exp_avg`` and ``exp_avg_sq``.
    """

    states: ClassVar[dict[str, Kind]] = {"exp_avg": "signed", "exp_avg_sq": "nonnegative"}
    options_type: ClassVar[type[Any]] = AdamOptions

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options, **common)

    @staticmethod
    def update(  # noqa: D102
        p: Tensor, grad: Tensor, states: dict[str, Tensor], step: int, options: AdamOptions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return adam_step(p, with_decay(grad, p, options.weight_decay), states, step, options)


PART = Adam
