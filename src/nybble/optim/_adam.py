"""What Adam and AdamW share: everything but where the decay goes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nybble.optim import check_range


@dataclass(frozen=True, kw_only=True)
class AdamOptions:
    """``lr`` >= 0, ``betas`` in [0, 1), ``eps`` >= 0, ``weight_decay`` >= 0."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_range("lr", self.lr)
        check_range("betas", self.betas, count=2, below=1.0)
        check_range("eps", self.eps)
        check_range("weight_decay", self.weight_decay)


def adam_step(
    p: Tensor, grad: Tensor, states: dict[str, Tensor], step: int, options: AdamOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    """The moments' update and the parameter's, in torch's order of operations; no decay."""
    beta1, beta2 = options.betas
    m = states["exp_avg"].lerp(grad, 1 - beta1)
    v = (states["exp_avg_sq"] * beta2).addcmul_(grad, grad, value=1 - beta2)
    return moved(p, m, v, step, options), {"exp_avg": m, "exp_avg_sq": v}


def moved(p: Tensor, m: Tensor, v: Tensor, step: int, options: AdamOptions) -> Tensor:
    """``p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)``: moments without their bias."""
    beta1, beta2 = options.betas
    denominator = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(options.eps)
    return p.addcdiv(m, denominator, value=-(options.lr / (1 - beta1**step)))
