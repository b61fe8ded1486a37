"""Training of what a packed file has room for anyhow: scales and offsets, norms, biases; codes stay.

    min over scales   L(f(x; s (q - zero)))        q fixed

With the task's loss it is the end-to-end phase of EfficientQAT (E2E-QP; Chen et al. 2024, arXiv:2407.11062, section
3.3); with a float network's logits, distillation into scales. The recipe step ``train: distill`` does the latter at the
end of a post-training recipe, on its calibration data; here are any task, data, schedule and optimizer.

Where we differ: EfficientQAT's rates are absolute; ``relative`` ones are shares of a tensor's mean magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from nybble.core.errors import ModelError, SchemeError
from nybble.nn.packed import Packed
from nybble.scheme import Scheme
from nybble.training.learners import Learners, unit_of
from nybble.training.methods import Given, Method, Place
from nybble.training.objective import make_losses

HELD = "_nybble_learners"


@dataclass(frozen=True, kw_only=True)
class ScalesOptions:
    """Of the training.

    ``what`` learns: of ``scales`` (and offsets), ``norms``, ``biases``. ``losses``: by name a weight, or a mapping of
    ``weight`` and the loss's options. ``rates``: learning rates over that of the loop, by what learns. ``relative``: a
    rate is a share of a tensor's mean magnitude.
    """

    what: tuple[Literal["scales", "norms", "biases"], ...] = ("scales",)
    losses: Mapping[str, Any] = field(default_factory=lambda: {"task": 1.0})
    rates: Mapping[str, float] = field(default_factory=dict)
    relative: bool = False


class Scales(Method):
    """See the module."""

    summary: ClassVar[str] = "scales, norms and biases of a packed model; codes stay"
    options_type: ClassVar[type[Any]] = ScalesOptions
    packs: ClassVar[bool] = True

    def check(self, options: ScalesOptions, scheme: Scheme) -> None:  # noqa: D102
        make_losses(options.losses)
        if not options.what or len(set(options.what)) != len(options.what):
            raise SchemeError(f"what={list(options.what)} names each of scales, norms, biases once, one at least.")
        for name, rate in options.rates.items():
            if name not in options.what or not rate >= 0:
                raise SchemeError(f"rates: {name}={rate}; a rate is 0 or more, of what learns ({options.what}).")

    def losses(self, options: ScalesOptions) -> Mapping[str, Any]:  # noqa: D102
        return options.losses

    def attach(self, model: nn.Module, given: Given) -> nn.Module:  # noqa: D102
        options: ScalesOptions = given.options
        held = [name for name, module in model.named_modules() if isinstance(module, Packed)]
        learners = Learners(model, dict.fromkeys(held, given.known), options.what)
        if not learners.parameters():
            learners.undo()
            raise ModelError(
                f"nothing to learn: the model has no {' or '.join(options.what)} that can move; name others of scales, "
                "norms, biases."
            )
        model.__dict__[HELD] = learners
        return model

    def groups(self, model: nn.Module, options: ScalesOptions, lr: float) -> list[dict[str, Any]]:  # noqa: D102
        learners: Learners = model.__dict__[HELD]
        return [
            {"params": [p], "lr": lr * options.rates.get(kind, 1.0) * unit_of(p, options.relative)}
            for kind, parameters in learners.groups().items()
            for p in parameters
        ]

    def parts(self, model: nn.Module) -> dict[str, int]:  # noqa: D102
        learned = {id(p) for p in model.__dict__[HELD].parameters()}
        found = {"model": 0, "learned": 0}
        for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
            found["learned" if id(t) in learned else "model"] += t.numel() * t.element_size()
        return found

    def finished(self, model: nn.Module, place: Place) -> nn.Module:  # noqa: D102
        learners: Learners = model.__dict__.pop(HELD)
        learners.settle()
        return model


PART = Scales()
