"""Work on a model that its owner holds: in evaluation mode, and as if nothing had been done where it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from nybble.nn.config import config_of

_PARTS = ("_parameters", "_buffers", "_modules")


@contextmanager
def whole_or_not_at_all(model: nn.Module) -> Iterator[None]:
    """Put a model back as it was where the work inside fails or is interrupted.

    Modules, parameters, buffers and configs are held, none is copied: what is replaced inside is freed at the end
    only. What writes into the memory of a tensor (instead of giving a parameter another one) isn't undone.
    """
    before = _State(model)
    try:
        yield
    except BaseException:
        before.restore()
        raise


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put a model back as it was, whatever becomes of the work inside; as :func:`whole_or_not_at_all` does."""
    before = _State(model)
    try:
        yield
    finally:
        before.restore()


class _State:
    """All that is restored of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [(m, _attributes(m), [dict(getattr(m, part)) for part in _PARTS]) for m in model.modules()]
        self.tensors = [(t, t.data, t.requires_grad) for t in (*model.parameters(), *model.buffers())]
        self.configs = [(config, dict(vars(config))) for config in _configs(model)]

    def restore(self) -> None:
        for module, attributes, parts in self.modules:
            for name in _attributes(module).keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)
            for part, held in zip(_PARTS, parts, strict=True):
                now = getattr(module, part)
                now.clear()  # the same mapping, in the order that it had
                now.update(held)
        for tensor, data, learns in self.tensors:
            tensor.data = data
            tensor.requires_grad_(learns)
        for config, known in self.configs:
            vars(config).clear()
            vars(config).update(known)


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Put models in evaluation mode, and each of their modules back at exit; one that is new follows its parent."""
    before = {module: module.training for model in models for module in model.modules()}
    for model in models:
        nn.Module.eval(model)  # a wrapper may have an eval of its own
    try:
        yield
    finally:
        for model in models:
            _set_modes(model, before, model.training)


def _set_modes(module: nn.Module, before: dict[nn.Module, bool], parent: bool) -> None:
    module.training = before.get(module, parent)
    for child in module.children():
        _set_modes(child, before, module.training)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _PARTS}


def _configs(model: nn.Module) -> list[Any]:
    """The configs that modules have, and those inside them, each once."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [config_of(module) for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if hasattr(config, "model_type") and id(config) not in found:
            found[id(config)] = config
            waiting += vars(config).values()
    return [*found.values()]
