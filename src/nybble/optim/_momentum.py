"""What SGD and LARS share: the direction in which a momentum goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from nybble.core.errors import UsageError
from nybble.optim import LowBitOptimizer, check_range
from nybble.optim._decays import with_decay
from nybble.optim._states import Kind


@dataclass(frozen=True, kw_only=True)
class MomentumOptions:
    """``lr``, ``momentum``, ``dampening``, ``weight_decay`` >= 0; ``nesterov`` with a momentum and no dampening."""

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "momentum", "dampening", "weight_decay"):
            check_range(name, getattr(self, name))
        if self.nesterov and (not self.momentum or self.dampening):
            raise UsageError(
                f"nesterov needs a momentum > 0 and dampening=0; got {self.momentum!r} and {self.dampening!r}."
            )


class MomentumRule(LowBitOptimizer):
    """A rule whose only state is a momentum, which is kept as long as there is one."""

    states: ClassVar[dict[str, Kind]] = {"momentum_buffer": "signed"}
    options_type: ClassVar[type[Any]] = MomentumOptions

    def shapes(self, p: Tensor, options: Any = None) -> dict[str, tuple[int, ...]]:
        momentum = self.defaults["momentum"] if options is None else options.momentum
        return super().shapes(p) if momentum else {}


def momentum_step(
    p: Tensor, grad: Tensor, states: dict[str, Tensor], step: int, options: MomentumOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    """What is taken from ``p``, before the rate, and the new momentum; in torch's order of operations.

    The first momentum is the gradient itself, not ``1 - dampening`` of it.
    """
    grad = with_decay(grad, p, options.weight_decay)
    if options.momentum == 0:
        return grad, {}
    if step == 1:
        buffer = grad.clone()
    else:
        buffer = states["momentum_buffer"].mul(options.momentum).add_(grad, alpha=1 - options.dampening)
    direction = grad.add(buffer, alpha=options.momentum) if options.nesterov else buffer
    return direction, {"momentum_buffer": buffer}
