"""What looks at the weights of a network in training at every update, one a file: it counts, freezes or moves some.

A file defines ``PART``, a :class:`Callback` with its options as fields. Any training of twins may have any of them, in
a recipe (``callbacks: {oscillation: {}}``) or in a loop of one's own::

    acting = make_part("oscillation", {}).attach(model)  # prepared
    ...
    acting.before_forward(progress, generator)
    loss = model(**batch).loss
    acting.after_forward(loss.detach())
    loss.backward()
    acting.before_update(progress)
    optimizer.step()
    acting.after_update(progress)

What they remember lies in the model's state dict, beside the weight that it is of, so a run that is gone on with counts
on; :func:`nybble.training.convert.convert` leaves it out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.core.options import build
from nybble.core.registry import Registry
from nybble.nn.twin import FakeWeight


class Acting(ABC):
    """A callback at work on one model; :attr:`weights` are those that it looks at, by name."""

    weights: Mapping[str, FakeWeight]

    def before_forward(self, progress: float, drawn: torch.Generator) -> None:  # noqa: B027 - most look at updates
        """A forward is about to be made; ``progress`` of the training: 0 to 1; ``drawn`` is the forward's own."""

    def after_forward(self, loss: Tensor) -> None:  # noqa: B027 - likewise
        """It was, with this loss: a scalar without a gradient."""

    def before_update(self, progress: float) -> None:  # noqa: B027 - most look behind it alone
        """Gradients are there, the optimizer's step is not. ``progress`` of the training: 0 to 1."""

    @abstractmethod
    def after_update(self, progress: float) -> None:
        """The optimizer has made its step."""

    @abstractmethod
    def newest(self) -> dict[str, float]:
        """Numbers of the newest update, over all weights; waits for the device."""

    @abstractmethod
    def layers(self) -> dict[str, dict[str, float]]:
        """Numbers of each weight, by its name, behind the last update."""


@dataclass(frozen=True, kw_only=True)
class Callback(ABC):
    """One of them; its fields are its options."""

    @abstractmethod
    def attach(self, model: nn.Module) -> Acting:
        """Let it work on a prepared model; what it remembers is added once.

        Raises:
            SchemeError: nothing in it is rounded, or a weight is rounded in a way that the callback can't judge; named.
        """


CALLBACKS = Registry("nybble.training.callbacks", "training callback")


def make_part(name: str, options: Mapping[str, Any] | None) -> Callback:
    """A callback by name.

    Raises:
        UsageError: no such callback. SchemeError: an unknown option, or a value that it can't have.
    """
    if not isinstance(options, Mapping | None):
        raise SchemeError(f"callbacks: {name} takes a mapping of options, {{}} for its own; got {options!r}.")
    made: Callback = build(CALLBACKS.get(name), options or {}, f"callbacks: {name}")
    return made


def rounded_weights(model: nn.Module, name: str) -> dict[str, FakeWeight]:
    """Weights that train and are rounded, by the names that their layers have.

    Raises:
        SchemeError: there are none.
    """
    found = {
        at.removesuffix("weight").removesuffix("."): weight
        for at, weight in model.named_modules()
        if isinstance(weight, FakeWeight) and weight.learned is not None and weight.latent.requires_grad
    }
    if not found:
        raise SchemeError(
            f"callback {name} looks at weights that train and are rounded, and there are none; name weights in the "
            "scheme, or leave the callback out."
        )
    return found
