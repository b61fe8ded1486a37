"""Every call of a contract, while tests run, against the shapes and dtypes in its signature.

A contract is whatever has a shape in an annotation (:mod:`nybble.core.shapes`) in one of :data:`MODULES`: functions,
torch ops, fields of dataclasses, and methods, with every override of them: of all parts, also of those that come later,
from a plug-in or a test. A name (``columns``) is one size for a whole call: arguments, fields of the dataclasses among
them, and what comes back. Of a sequence of dataclasses (weights that share their input) each item is compared with the
rest on its own.

What nybble refuses by itself is no matter of ours: a NybbleError passes.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import update_wrapper
from types import FunctionType
from typing import Any

import torch
from jaxtyping import jaxtyped
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from nybble.core.errors import NybbleError
from nybble.core.shapes import KINDS

MODULES = (
    "nybble.ops.rounding", "nybble.ops.scaling", "nybble.ops.blocks", "nybble.ops.tables", "nybble.ops.grid",
    "nybble.granularity", "nybble.scales", "nybble.quantizer", "nybble.learned", "nybble.optim",
    "nybble.calibration.error", "nybble.solvers", "nybble.calibration.mixing", "nybble.reconstruction",
)  # fmt: skip

Hints = Mapping[str, Any]
Claim = tuple[str, Any, Any]  # name, value, hint
_fields: dict[type, Hints] = {}  # of the dataclasses among the contracts
_shaped: dict[type, tuple[str, ...]] = {}  # of any class that a call has met: its fields that have shapes


class ShapeError(AssertionError):
    """A call against its signature."""


def check_contracts() -> dict[str, list[str]]:
    """Begin to check; the contracts found, by module."""
    modules = [importlib.import_module(name) for name in MODULES]
    _shaped.clear()
    for module in modules:
        for kind in vars(module).values():
            if not inspect.isclass(kind) or kind.__module__ != module.__name__ or not dataclasses.is_dataclass(kind):
                continue
            if fields := _shapes(vars(kind).get("__annotations__", {}), module):
                _fields[kind] = fields
    return {module.__name__: list(_check_module(module)) for module in modules}


def _check_module(module: Any) -> Iterable[str]:
    for name, part in list(vars(module).items()):
        function = part._init_fn if isinstance(part, CustomOpDef) else part
        if getattr(function, "__module__", "") != module.__name__:
            continue  # imported from elsewhere
        if isinstance(part, CustomOpDef):
            if hints := _shapes(part._init_fn.__annotations__, module):
                _check_op(part, hints)
                yield name
        elif inspect.isfunction(part):
            if hints := _shapes(part.__annotations__, module):
                _replace(part, _checked(part, hints))
                yield name
        elif inspect.isclass(part):
            yield from _check_class(part, module)


def _shapes(annotations: Mapping[str, Any], module: Any) -> dict[str, Any]:
    """The annotations that have shapes, evaluated."""
    mine = {n: str(text) for n, text in annotations.items() if any(f"{kind}[" in str(text) for kind in KINDS)}
    space = {"Tensor": Tensor, **vars(module)}  # modules that do without torch until they calculate don't have it
    return {name: eval(text, space) for name, text in mine.items()}


# ------------------------------------------------------------------------------------------- where checks are put
def _check_op(op: CustomOpDef, hints: Hints) -> None:
    """Others hold the op itself, so it gets another class."""
    kind: Any = type(op)
    checked = _checked(op._init_fn, hints, lambda *args, **kwargs: kind.__call__(op, *args, **kwargs))
    op.__class__ = type(kind.__name__, (kind,), {"__call__": lambda self, *args, **kwargs: checked(*args, **kwargs)})


def _replace(function: Callable[..., Any], by: Callable[..., Any]) -> None:
    """Wherever it was imported."""
    for module in [m for name, m in list(sys.modules.items()) if name.partition(".")[0] in ("nybble", "tests")]:
        for name, value in list(vars(module).items()):
            if value is function:
                setattr(module, name, by)


def _check_class(kind: Any, module: Any) -> Iterable[str]:
    methods: dict[str, Hints] = {"__init__": {}} if kind in _fields else {}
    for name, method in vars(kind).items():
        function = inspect.unwrap(getattr(method, "__func__", method))
        if not inspect.isfunction(function) or name == "__init__":
            continue
        hints = _shapes(function.__annotations__, module)
        if hints or any(_names_fields(text, module) for text in function.__annotations__.values()):
            methods[name] = hints
    if not methods:
        return

    def check(cls: Any) -> None:
        for name in methods.keys() & vars(cls).keys():
            found = vars(cls)[name]
            if isinstance(found, staticmethod | classmethod):
                setattr(cls, name, type(found)(_checked(found.__func__, methods[name])))
            else:
                setattr(cls, name, _checked(found, methods[name]))
        for sub in cls.__subclasses__():
            check(sub)

    check(kind)

    def begin(cls: Any, /, **options: Any) -> None:
        super(kind, cls).__init_subclass__(**options)
        check(cls)

    kind.__init_subclass__ = classmethod(begin)
    yield from (f"{kind.__name__}.{name}" for name in methods)


def _names_fields(annotation: object, module: Any) -> bool:
    """Whether it is a dataclass with shapes, or a sequence of them."""
    return any(vars(module).get(word) in _fields for word in re.findall(r"\w+", str(annotation)))


# ----------------------------------------------------------------------------------------------- what a check does
def _checked(function: Callable[..., Any], hints: Hints, run: Callable[..., Any] | None = None) -> Callable[..., Any]:
    signature, run = inspect.signature(function), run or function
    name = f"{function.__module__}.{function.__qualname__}"
    seen: set[Any] = set()  # shapes and dtypes that are right
    met: set[Any] = set()  # the same by place, before arguments have their names: most calls end there

    def judge(given: Mapping[str, Any]) -> None:
        claims = [claim for key, value in given.items() for claim in _claims(key, value, hints)]
        items = [_claims("item", item, {}) for value in given.values() for item in _items(value)]
        key = tuple(_key(value) for _, value, _ in sum(items, claims))
        if key in seen:
            return
        for more in [[], *items]:
            if wrong := _wrong(claims + more):
                raise ShapeError(f"{name}: {wrong}")
        seen.add(key)

    def checked(args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return run(*args, **kwargs)
        try:
            found = run(*args, **kwargs)
        except Exception as error:
            if not isinstance(error, NybbleError):
                with suppress(TypeError):  # other arguments than it has
                    judge(signature.bind(*args, **kwargs).arguments)
            raise
        place = (*map(_place, args), *((name, _place(value)) for name, value in kwargs.items()), _place(found))
        if place not in met:
            judge(signature.bind(*args, **kwargs).arguments | {"return": found})
            met.add(place)
        return found

    def call(*args: Any, **kwargs: Any) -> Any:
        return checked(args, kwargs)

    # In the function's own namespace: where doctest looks for it.
    space = getattr(function, "__globals__", {})
    return update_wrapper(FunctionType(call.__code__, space, call.__name__, None, call.__closure__), function)


def _claims(name: str, value: Any, hints: Hints) -> list[Claim]:
    """What has to hold of an argument."""
    found = [(name, value, hints[name])] if name in hints else []
    for kind in (k for k in type(value).__mro__ if k in _fields):
        own = vars(value)  # not all, where __init__ has failed
        found += [(f"{name}.{field}", own[field], hint) for field, hint in _fields[kind].items() if field in own]
    return found


def _items(value: Any) -> list[Any]:
    return [item for item in value if type(item) in _fields] if isinstance(value, list | tuple) else []


def _key(value: Any) -> Any:
    """All that a check looks at."""
    if isinstance(value, Mapping):
        return tuple((key, _key(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return (type(value), *map(_key, value))
    return (type(value), value.dtype, value.shape) if isinstance(value, Tensor) else type(value)


def _place(value: Any) -> Any:
    """As :func:`_key`, with the fields that have shapes."""
    if isinstance(value, Tensor):
        return type(value), value.dtype, value.shape
    kind = type(value)
    if isinstance(value, list | tuple):
        return (kind, *map(_place, value))
    if isinstance(value, Mapping):
        return (kind, *((name, _place(item)) for name, item in value.items()))
    if (names := _shaped.get(kind)) is None:
        names = _shaped[kind] = tuple(name for k in kind.__mro__ for name in _fields.get(k, ()))
    if not names:
        return kind
    own = vars(value)
    return (kind, *(_place(own[name]) if name in own else None for name in names))


def _wrong(claims: list[Claim]) -> str | None:
    """The first claim that doesn't hold beside those before it, in words."""
    with jaxtyped("context"):
        for index, (name, value, hint) in enumerate(claims):
            try:
                check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
            except TypeCheckError:
                rest = ", ".join(f"{other} = {_text(given)}" for other, given, _ in claims[:index])
                return f"{name} is {_text(value)}, not {hint}" + (f"; with {rest}" if rest else "")
    return None


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_text, value)) + "]"
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
