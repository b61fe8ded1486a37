"""Which kind a module is of, and where in a model kinds find what they are about."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

from nybble.core.errors import FileError, ModelError
from nybble.core.registry import Registry
from nybble.nn.kinds._base import Get, Kind, Target, first_tensor, live

REGISTRY = Registry("nybble.nn.kinds", "kind of module")


@cache
def all_kinds() -> tuple[Kind, ...]:
    """All kinds in the order in which they are asked; a kind of another package that can't be used is left out.

    Warns:
        UserWarning: names such a kind, and why.
    """
    folder = importlib.import_module(REGISTRY.package).__path__
    own = {module.name.replace("_", "-") for module in pkgutil.iter_modules(folder)}
    kinds: dict[str, Kind] = {REGISTRY.get(name).entry: REGISTRY.get(name) for name in REGISTRY.names() if name in own}
    others: list[Kind] = []
    for name in sorted(set(REGISTRY.names()) - own):
        try:
            kind = REGISTRY.get(name)
            if not isinstance(kind, Kind):
                raise TypeError(f"it is {kind!r:.80} and no Kind")
            if kind.entry in kinds:
                raise ValueError(f"its entry {kind.entry!r} is another kind's")
        except Exception as error:
            text = f"the kind of module {name!r} of another package is left out ({type(error).__name__}: {error})"
            warnings.warn(text, stacklevel=2)
            continue
        kinds[kind.entry] = kind
        others.append(kind)
    return (*others, *(kind for kind in kinds.values() if kind not in others))


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a float module; None for those that nothing quantizes."""
    return next((kind for kind in all_kinds() if kind.claims(module)), None)


@cache
def _stand_ins() -> dict[type[nn.Module], Kind]:
    return {cls: kind for kind in reversed(all_kinds()) for cls in kind.stand_ins}


def kind_of_quantized(module: nn.Module) -> Kind | None:
    """The kind of a quantized module, its nearest class deciding; None for all others."""
    known = _stand_ins()
    return next((known[cls] for cls in type(module).__mro__ if cls in known), None)


def kind_of_entry(name: str, entry: Any) -> Kind:
    """The kind that a file's description of the module called ``name`` is of.

    Raises:
        FileError: the description has no class, or one that no kind has.
    """
    if not isinstance(entry, dict) or "class" not in entry:
        raise FileError(f"malformed description of {name} ({entry!r:.80}).")
    for kind in all_kinds():
        if kind.entry == entry["class"]:
            return kind
    raise FileError(
        f"{name} is described as a {entry['class']!r:.80}, which this nybble does not know; "
        "update it, or install the package that brings this kind of module."
    )


def targets_of(root: nn.Module) -> dict[str, Target]:
    """All that a scheme can quantize in a model, by name.

    Modules that share inputs come first, in the model's order, then embeddings, experts and what other kinds there are,
    each in the model's order: the rows of a report are in this order.
    """
    found = [target for name, module in root.named_modules() for target in _targets(name, module)]
    found.sort(key=lambda target: "" if target.kind.shares_input else target.kind.entry)
    return {target.name: target for target in found}


def look_alikes(root: nn.Module, convolutional: bool = False) -> dict[str, tuple[str, ...]]:
    """Modules that no kind claims and that look like those of one: name -> class names, as if they were of the kind."""
    found: dict[str, tuple[str, ...]] = {}
    for name, module in root.named_modules():
        near = next((kind for kind in all_kinds() if kind.resembles(module)), None)
        if near is not None and kind_of(module) is None:
            found[name] = near.class_names(module, convolutional)
    return found


def apart_line(classes: Mapping[str, str]) -> str:
    """Says which modules stay in float though a scheme asks for them; ``classes``: name -> class, at least one."""
    named = ", ".join(f"{name} ({cls})" for name, cls in list(classes.items())[:8])
    more = f" and {len(classes) - 8} more" if len(classes) > 8 else ""
    return f"left in float, since they compute something else with their weight: {named}{more}"


def _targets(name: str, module: nn.Module) -> Iterator[Target]:
    kind = kind_of(module)
    return iter(()) if kind is None else kind.targets(name, module)


def _weight_at(root: nn.Module, name: str) -> tuple[str, nn.Module, Kind | None, str]:
    """Where a weight is: path of the module, the module, its kind, and the parameter's name if the kind needs it."""
    owner, _, leaf = name.rpartition(".")
    parent = root.get_submodule(owner)
    kind = kind_of(parent)
    if kind is not None and kind.fused and isinstance(getattr(parent, leaf, None), nn.Parameter):
        return owner, parent, kind, leaf
    module = getattr(parent, leaf, None)
    kind = kind_of(module) if isinstance(module, nn.Module) else None
    plain = isinstance(module, nn.Module) and isinstance(getattr(module, "weight", None), Tensor)
    if not isinstance(module, nn.Module) or (kind is None and not plain) or (kind is not None and kind.operands):
        raise ModelError(f"{type(root).__name__} has no matmul weight called {name!r}.")
    return name, module, kind, ""


def matrix_at(root: nn.Module, name: str, get: Get | None = None) -> Tensor:
    """The matrix of a weight by name, [out, in]; of fused experts [experts, out, in]. A view where it can be one.

    Its columns are the channels of what the module is called with, also of one that is quantized behind a rotation.

    Args:
        root: the module that ``name`` is relative to.
        name: a module or a fused parameter; of a module that no kind claims (a router) its weight, as it is.
        get: gives parameters by full name, where not the live ones are wanted.

    Raises:
        ModelError: no such weight.
    """
    path, module, kind, leaf = _weight_at(root, name)
    found = live(module) if get is None else lambda key: get(f"{path}.{key}")
    return found("weight") if kind is None else kind.unrotated.matrix(module, leaf, found)


def values_at(root: nn.Module, name: str, matrix: Tensor) -> dict[str, Tensor]:
    """Inverse of :func:`matrix_at`: parameters by full name, and what they must hold for the matrix to be this one."""
    path, module, kind, leaf = _weight_at(root, name)
    values = {"weight": matrix} if kind is None else kind.unrotated.values(module, leaf, matrix)
    return {f"{path}.{key}": value for key, value in values.items()}


def read_by(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a module, float or quantized, multiplies in a call; of others, the first argument."""
    kind = kind_of(module) or kind_of_quantized(module)
    return first_tensor(args, kwargs) if kind is None else kind.reads(args, kwargs)
