"""Both ways in which a rule pulls weights towards 0: in the gradient, or beside it."""

from __future__ import annotations

from torch import Tensor


def with_decay(grad: Tensor, p: Tensor, decay: float) -> Tensor:
    """``grad + decay p``: that of L2 regularization (Adam, SGD, RMSprop, Adagrad); with 0 the gradient itself."""
    return grad.add(p, alpha=decay) if decay != 0 else grad


def shrunk(p: Tensor, lr: float, decay: float) -> Tensor:
    """``p (1 - lr decay)``: decoupled from the gradient (AdamW, Lion, Adafactor); with 0 the parameter itself."""
    return p * (1 - lr * decay) if decay != 0 else p
