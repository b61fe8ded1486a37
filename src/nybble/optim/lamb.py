"""LAMB: Adam's direction, scaled by the norms of the weight and of the direction; both moments in few bits.

You et al. 2020, arXiv:1904.00962, algorithm 2; or as bitsandbytes clips it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from nybble.optim import LowBitOptimizer, check_range
from nybble.optim._common import Common
from nybble.optim._decays import shrunk, with_decay
from nybble.optim._norms import clipped
from nybble.optim._states import Kind


@dataclass(frozen=True, kw_only=True)
class LAMBOptions:
    """``lr`` >= 0, ``betas`` in [0, 1), ``eps`` >= 0, ``weight_decay`` >= 0.

    ``max_unorm``: the largest norm of a direction for each unit of the weight's, 0 for any; None for the paper's ratio.
    """

    lr: float = 1e-3
    bias_correction: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    adam_w_mode: bool = True
    max_unorm: float | None = 1.0

    def __post_init__(self) -> None:
        check_range("lr", self.lr)
        check_range("betas", self.betas, count=2, below=1.0)
        check_range("eps", self.eps)
        check_range("weight_decay", self.weight_decay)
        if self.max_unorm is not None:
            check_range("max_unorm", self.max_unorm)


class LAMB(LowBitOptimizer):
    """LAMB, whose moments are kept by Quantizers.

    ::

        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
        c1 = 1 - b1^t;  c2 = sqrt(1 - b2^t);  u = m / (sqrt(v) + eps c2)                     bitsandbytes' form
        p <- p (1 - lr wd) - lr c2 / c1 min(1, max_unorm |p| / |u|) u
        u = m / c1 / (sqrt(v) / c2 + eps) + wd p;  p <- p - lr |p| / |u| u                   max_unorm=None: the paper's

    The paper's ratio is 1 where a norm is 0. With ``state=None`` the first form is bitsandbytes' ``LAMB32bit``: bit for
    bit on float32 parameters where nothing is clipped, and elsewhere but for the last bit of the factor, which they get
    by a reciprocal. Their 8-bit LAMB leaves the norms out and is plain AdamW, ours is not.

    Args:
        params: parameters, named parameters or groups, or a module.
        lr, betas, eps, weight_decay, max_unorm: :class:`LAMBOptions`; a group may have its own.
        bias_correction: False takes c1 = c2 = 1.
        adam_w_mode: False adds ``wd p`` to the gradient instead.
        common: :class:`~nybble.optim._common.Common`; the moments are ``exp_avg`` and ``exp_avg_sq``.
    """

    states: ClassVar[dict[str, Kind]] = {"exp_avg": "signed", "exp_avg_sq": "nonnegative"}
    options_type: ClassVar[type[Any]] = LAMBOptions
    elementwise: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        max_unorm: float | None = 1.0,
        **common: Unpack[Common],
    ) -> None:
        options = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        options |= {"weight_decay": weight_decay, "adam_w_mode": adam_w_mode, "max_unorm": max_unorm}
        super().__init__(params, options, **common)

    @staticmethod
    def update(  # noqa: D102
        p: Tensor, grad: Tensor, states: dict[str, Tensor], step: int, options: LAMBOptions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        beta1, beta2 = options.betas
        if not options.adam_w_mode:
            grad = with_decay(grad, p, options.weight_decay)
        m = states["exp_avg"].mul(beta1).add_(grad, alpha=1 - beta1)
        v = states["exp_avg_sq"].mul(beta2).addcmul_(grad, grad, value=1 - beta2)
        c = (1 - beta1**step, (1 - beta2**step) ** 0.5) if options.bias_correction else (1.0, 1.0)
        decay = options.weight_decay if options.adam_w_mode else 0.0
        moved = _published if options.max_unorm is None else _clipped
        return moved(p, m, v, c, decay, options), {"exp_avg": m, "exp_avg_sq": v}


def _clipped(p: Tensor, m: Tensor, v: Tensor, c: tuple[float, float], decay: float, options: LAMBOptions) -> Tensor:
    assert options.max_unorm is not None
    direction = m / v.sqrt().add_(options.eps * c[1])
    scale = clipped(p, direction, options.max_unorm)
    return shrunk(p, options.lr, decay).add(direction, alpha=float(-options.lr * c[1] / c[0] * scale))


def _published(p: Tensor, m: Tensor, v: Tensor, c: tuple[float, float], decay: float, options: LAMBOptions) -> Tensor:
    direction = (m / c[0]).div_((v.sqrt() / c[1]).add_(options.eps)).add_(p, alpha=decay)
    size, moved = torch.linalg.vector_norm(p), torch.linalg.vector_norm(direction)
    ratio = torch.where((size > 0) & (moved > 0), size / moved, 1.0)
    return p.add(direction, alpha=float(-options.lr * ratio))


PART = LAMB
