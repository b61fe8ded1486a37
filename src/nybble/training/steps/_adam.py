"""Adam with a learning rate for every tensor, all moved together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

BETAS, EPSILON = (0.9, 0.999), 1e-8


class Adam:
    """``torch.optim.Adam`` with its defaults and one group a tensor, bit for bit; these it moves one by one.

    A network has hundreds of tensors of scales, and a kernel for each takes longer to start than to run.

    Args:
        parameters: what is moved; those without a gradient stay, and their moments too.
        rates: the learning rate of each.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rates: Sequence[float]) -> None:
        self.parameters, self.rates = list(parameters), list(rates)
        self._first = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._second = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._steps = [0] * len(self.parameters)

    @torch.no_grad()
    def step(self, share: float) -> None:
        """Move against the gradients, every rate times ``share``."""
        places = [place for place, parameter in enumerate(self.parameters) if parameter.grad is not None]
        if not places:
            return
        for place in places:
            self._steps[place] += 1
        gradients = [grad for parameter in self.parameters if (grad := parameter.grad) is not None]
        first, second = ([moments[place] for place in places] for moments in (self._first, self._second))
        torch._foreach_lerp_(first, gradients, 1 - BETAS[0])
        torch._foreach_mul_(second, BETAS[1])
        torch._foreach_addcmul_(second, gradients, gradients, 1 - BETAS[1])
        widths = torch._foreach_sqrt(second)
        torch._foreach_div_(widths, [math.sqrt(1 - BETAS[1] ** self._steps[place]) for place in places])
        torch._foreach_add_(widths, EPSILON)
        sizes = [-(self.rates[place] * share) / (1 - BETAS[0] ** self._steps[place]) for place in places]
        torch._foreach_addcdiv_([self.parameters[place] for place in places], first, widths, sizes)
