"""One training step in emulated arithmetic: what the exported C computes, bit for bit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.core.errors import DataError, UsageError, did_you_mean
from nybble.microcontroller.arithmetic import Arithmetic
from nybble.microcontroller.layer import Layer
from nybble.microcontroller.losses import LOSSES, loss_and_gradient
from nybble.microcontroller.stack import Stack, plan

Named = dict[str, dict[str, Tensor]]
"""Layer -> role -> tensor."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a training step came to.

    Attributes:
        loss: before the update. output: ``[n]`` of the type. gradients: of what was trained, after weight decay.
        carried: number of a tensor -> its gradient.
    """

    loss: float
    output: Tensor
    gradients: Named
    carried: Mapping[int, Tensor]


class Emulator:
    """A network in training.

    Args:
        stack: the network; its weights are rounded to the type, and stay its own.
        math: what is calculated with.
        update: layers that learn, as :func:`nybble.microcontroller.stack.plan` takes them.
        loss: one of :data:`~nybble.microcontroller.losses.LOSSES`.

    Attributes:
        weights: as they are now.

    Raises:
        UsageError: as :func:`~nybble.microcontroller.stack.plan`; no such loss.
    """

    def __init__(
        self, stack: Stack, math: Arithmetic, *, update: Collection[str] | None = None, loss: str = "cross_entropy"
    ) -> None:
        if loss not in LOSSES:
            raise UsageError(f"no loss {loss!r}.{did_you_mean(loss, LOSSES)}")
        self.stack, self.math, self.loss, self.plan = stack, math, loss, plan(stack, update)
        self.weights: Named = {
            name: {role: value.to(math.dtype) for role, value in held.items()} for name, held in stack.weights.items()
        }

    @torch.no_grad()
    def forward(self, x: Tensor) -> list[Tensor]:
        """All tensors of the network.

        Args:
            x: one sample, of the input's shape.

        Raises:
            DataError: another shape; a batch has to be given sample by sample.
        """
        if tuple(x.shape) != self.stack.shapes[0]:
            raise DataError(
                f"the input has the shape {[*x.shape]}; the network takes one sample at a time, "
                f"{[*self.stack.shapes[0]]}."
            )
        found: dict[int, Tensor] = {0: x.to(self.math.dtype)}
        for layer in self.stack.layers:
            given = [found[number] for number in layer.inputs]
            found[layer.output] = layer.forward(self.math, self.weights.get(layer.name, {}), given).reshape(layer.out)
        return [found[number] for number in range(len(self.stack.shapes))]

    @torch.no_grad()
    def step(self, x: Tensor, target: Tensor | int, rate: float, decay: float = 0.0) -> Step:
        """Forward, both gradients, SGD: ``w -= rate * (g + decay * w)``, all of it in the type.

        Args:
            x: one sample.
            target: ``[n]``, shares of classes or values; or the class.
            rate: of learning, rounded to float32, then to the type; so is ``decay``.
            decay: of weights.

        Raises:
            DataError: another shape, a class that there is not.
        """
        tensors = self.forward(x)
        output = tensors[self.stack.output].flatten()
        loss, gradient = loss_and_gradient(self.loss, output, self._target(target))
        carried = {self.stack.output: gradient.reshape(self.stack.shapes[self.stack.output])}
        gradients: Named = {}
        for layer in self.plan.backward:
            self._back(layer, tensors, carried, gradients)
        for layer in self.stack.layers:
            if layer.name in gradients:
                self._update(layer.name, gradients[layer.name], rate, decay)
        return Step(loss=float(loss), output=output, gradients=gradients, carried=carried)

    def _target(self, target: Tensor | int) -> Tensor:
        count = self.stack.outputs
        if isinstance(target, int):
            if not 0 <= target < count:
                raise DataError(f"class {target}: the network has {count}, 0 to {count - 1}.")
            return torch.nn.functional.one_hot(torch.tensor(target), count).float()
        if tuple(target.shape) != (count,):
            raise DataError(f"the target has the shape {[*target.shape]}; [{count}] is needed.")
        return target.float()

    def _back(self, layer: Layer, tensors: list[Tensor], carried: dict[int, Tensor], gradients: Named) -> None:
        held, dy = self.weights.get(layer.name, {}), carried[layer.output]
        given = [tensors[number] for number in layer.inputs]
        if layer.name in self.plan.updated:
            found = layer.learn(self.math, held, given, dy)
            gradients[layer.name] = {role: found[role] for role in layer.parameters}
        if not self.plan.carried.intersection(layer.inputs):
            return
        for number, dx in zip(layer.inputs, layer.back(self.math, held, given, tensors[layer.output], dy), strict=True):
            if number in self.plan.carried:
                carried[number] = carried[number] + dx if number in carried else dx

    def _update(self, name: str, gradients: dict[str, Tensor], rate: float, decay: float) -> None:
        held, by, shrink = self.weights[name], self.math.constant(rate), self.math.constant(decay)
        for role, gradient in gradients.items():
            if decay:
                gradients[role] = gradient = gradient + shrink * held[role]
            held[role] = held[role] - by * gradient
