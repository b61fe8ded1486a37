"""RMSprop with its averages in few bits between steps.

Hinton 2012, lecture 6e; centred as in Graves 2013, arXiv:1308.0850, equations 38 to 45.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from nybble.core.errors import SchemeError
from nybble.optim import LowBitOptimizer, check_range
from nybble.optim._common import Common
from nybble.optim._decays import with_decay
from nybble.optim._states import Kind


@dataclass(frozen=True, kw_only=True)
class RMSpropOptions:
    """``lr``, ``eps``, ``weight_decay``, ``momentum`` >= 0, ``alpha`` in [0, 1]."""

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay", "momentum"):
            check_range(name, getattr(self, name))
        check_range("alpha", self.alpha, below=1.0 + 2.0**-52)


class RMSprop(LowBitOptimizer):
    """``torch.optim.RMSprop`` whose averages are kept by Quantizers.

    ::

        g <- g + wd p;  v <- alpha v + (1 - alpha) g^2;  a <- a + (1 - alpha)(g - a)  if centred
        d = sqrt(v - a^2) + eps;  b <- momentum b + g / d;  p <- p - lr b

    With ``state=None`` every step equals ``torch.optim.RMSprop(foreach=False)`` bit for bit on float32 parameters, but
    where its v - a^2 falls below 0, and NaN comes: it is 0 here. ``centered`` wants v and a in float32, since the
    difference of two rounded moments says nothing.

    Args:
        params: parameters, named parameters or groups, or a module.
        lr, alpha, eps, weight_decay, momentum, centered: :class:`RMSpropOptions`; a group may have its own.
        common: :class:`~nybble.optim._common.Common`; the states are ``square_avg``, with a momentum
            ``momentum_buffer``, and if centred ``grad_avg``.
    """

    states: ClassVar[dict[str, Kind]] = {
        "square_avg": "nonnegative",
        "momentum_buffer": "signed",
        "grad_avg": "signed",
    }
    options_type: ClassVar[type[Any]] = RMSpropOptions

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        **common: Unpack[Common],
    ) -> None:
        options = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "momentum": momentum, "centered": centered}, **common)

    def shapes(self, p: Tensor, options: Any = None) -> dict[str, tuple[int, ...]]:  # noqa: D102
        options = self._options(self.defaults) if options is None else options
        kept = {"square_avg": True, "momentum_buffer": options.momentum > 0, "grad_avg": options.centered}
        return {name: shape for name, shape in super().shapes(p).items() if kept[name]}

    def _check_group(self, index: int) -> None:
        super()._check_group(index)
        group = self.param_groups[index]
        quantized = [name for name in ("square_avg", "grad_avg") if group["state"][name] is not None]
        if group["centered"] and quantized:
            raise SchemeError(
                f"centered takes the square of grad_avg from square_avg, which rounding drowns; {quantized[0]} is kept "
                f"in {group['state'][quantized[0]]!r}. Keep both in float32: state={{'square_avg': None, 'grad_avg': "
                "None, 'momentum_buffer': 'state8'}, or leave centered out."
            )

    @staticmethod
    def update(  # noqa: D102
        p: Tensor, grad: Tensor, states: dict[str, Tensor], step: int, options: RMSpropOptions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        grad = with_decay(grad, p, options.weight_decay)
        v = states["square_avg"].mul(options.alpha).addcmul_(grad, grad, value=1 - options.alpha)
        new = {"square_avg": v}
        if options.centered:
            new["grad_avg"] = mean = states["grad_avg"].lerp(grad, 1 - options.alpha)
            v = v.addcmul(mean, mean, value=-1).clamp_min_(0)
        denominator = v.sqrt().add_(options.eps)
        if options.momentum == 0:
            return p.addcdiv(grad, denominator, value=-options.lr), new
        new["momentum_buffer"] = buffer = states["momentum_buffer"].mul(options.momentum).addcdiv_(grad, denominator)
        return p.add(buffer, alpha=-options.lr), new


PART = RMSprop
