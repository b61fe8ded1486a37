"""Muon: a momentum made orthogonal by a Newton-Schulz iteration; the momentum in few bits between steps.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Liu et al. 2025, arXiv:2502.16982
(rates).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Unpack

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from nybble.core.errors import UsageError
from nybble.optim import LowBitOptimizer, check_range
from nybble.optim._common import Common
from nybble.optim._states import Kind

Adjust = Literal["original", "match_rms_adamw"]
QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x**3 and x**5 that lift small singular values fastest."""


@dataclass(frozen=True, kw_only=True)
class MuonOptions:
    """``lr``, ``weight_decay``, ``eps`` >= 0, ``momentum`` in [0, 1), ``ns_steps`` a whole number below 100."""

    lr: float = 1e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    ns_coefficients: tuple[float, float, float] = QUINTIC
    eps: float = 1e-7
    ns_steps: int = 5
    adjust_lr_fn: Adjust | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "eps"):
            check_range(name, getattr(self, name))
        check_range("momentum", self.momentum, below=1.0)
        check_range("ns_steps", self.ns_steps, below=100, whole=True)
        if len(tuple(self.ns_coefficients)) != 3:
            raise UsageError(f"ns_coefficients are three numbers; got {self.ns_coefficients!r}.")
        if self.adjust_lr_fn not in (None, "original", "match_rms_adamw"):
            raise UsageError(f"adjust_lr_fn is 'original', 'match_rms_adamw' or None; got {self.adjust_lr_fn!r}.")


class Muon(LowBitOptimizer):
    """``torch.optim.Muon`` whose momentum is kept by a Quantizer; for matrices of hidden layers.

    ::

        b <- b + (1 - momentum)(g - b);  u = g + momentum (b - g) if nesterov else b
        X = u / max(|u|, eps), wide;  ns_steps times  A = X X^T;  X <- a X + (b A + c A A) X      in bfloat16
        p <- p (1 - lr wd) - lr r X;  r = sqrt(max(1, rows / columns)), or 0.2 sqrt(max(rows, columns))

    With ``state=None`` every step equals ``torch.optim.Muon`` bit for bit on float32 parameters.

    Args:
        params: parameters of two dimensions, named parameters or groups. Embeddings, heads, biases and norms belong to
            another optimizer.
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps: :class:`MuonOptions`.
        adjust_lr_fn: ``original`` (None is that) or ``match_rms_adamw``, which goes with a rate tuned for AdamW.
        common: :class:`~nybble.optim._common.Common`; the state is ``momentum_buffer``, of both signs.
    """

    states: ClassVar[dict[str, Kind]] = {"momentum_buffer": "signed"}
    options_type: ClassVar[type[Any]] = MuonOptions
    elementwise: ClassVar[bool] = False
    counts: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = QUINTIC,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: Adjust | None = None,
        **common: Unpack[Common],
    ) -> None:
        options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        options |= {"ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        super().__init__(params, options, **common)

    @staticmethod
    def refusal(p: Tensor) -> str | None:  # noqa: D102
        if p.dim() == 2:
            return None
        return (
            f"it takes matrices; this parameter has shape {list(p.shape)}. Give it to another optimizer (AdamW8bit), "
            "or view it as a matrix."
        )

    @staticmethod
    def update(  # noqa: D102
        p: Tensor, grad: Tensor, states: dict[str, Tensor], step: int, options: MuonOptions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        buffer = states["momentum_buffer"].lerp(grad, 1 - options.momentum)
        direction = grad.lerp(buffer, options.momentum) if options.nesterov else buffer
        if p.numel():
            direction = orthogonal(direction, options)
        moved = p * (1 - options.lr * options.weight_decay)
        return moved.add_(direction, alpha=-options.lr * _ratio(p, options)), {"momentum_buffer": buffer}


def orthogonal(x: Tensor, options: MuonOptions) -> Tensor:
    """Something like ``U V^T`` of ``x = U S V^T``: its singular values lie around 1 (bfloat16, shape of ``x``)."""
    a, b, c = options.ns_coefficients
    tall = x.size(0) > x.size(1)
    wide: Tensor = x.bfloat16().T if tall else x.bfloat16()
    wide = wide / wide.norm().clamp(min=options.eps)
    for _ in range(options.ns_steps):
        gram = wide @ wide.T
        odd: Tensor = gram.addmm(gram, gram, beta=b, alpha=c)
        wide = wide.addmm(odd, wide, beta=a)
    return wide.T if tall else wide


def _ratio(p: Tensor, options: MuonOptions) -> float:
    rows, columns = p.shape
    if options.adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / max(columns, 1)))


PART = Muon
