"""A part's options, typed by its annotations: what YAML holds becomes the fields of a frozen dataclass.

Understood: ``bool``, ``int``, ``float`` (an integer will do), ``str``, ``Literal``, ``X | None``, ``tuple[X, ...]`` and
``tuple[X, Y]`` (lists in YAML), ``Mapping[str, X]``, nested dataclasses (mappings), and *parts*: a class with a class
attribute ``registry`` is written as a part's name, or as ``{name: {option: value}}``.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar

from nybble.core.errors import SchemeError, UsageError, did_you_mean

T = TypeVar("T")


def settings_of(kind: type[T], given: T | Mapping[str, Any] | None, name: str) -> T:
    """Settings as they are, from a mapping of their fields, or the defaults.

    Args:
        kind: their class, a dataclass whose fields have defaults.
        given: what a caller handed over.
        name: of the class as users know it.

    Raises:
        UsageError: something else. SchemeError: an unknown field, with the closest one, or a wrong type.
    """
    if isinstance(given, kind):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise UsageError(f"settings are a {name} or a mapping of its fields; got {given!r}.")
    return build(kind, given or {}, "settings")


def build(kind: type[T], options: Mapping[str, Any], where: str) -> T:
    """An object of ``kind``, a dataclass whose fields are its options.

    Args:
        kind: the dataclass.
        options: by name.
        where: what the options are of, for messages: ``solver 'gptq'``.

    Raises:
        SchemeError: an unknown option (with the closest one), one that is missing, or a value of the wrong type.
    """
    fields = {f.name: f for f in dataclasses.fields(typing.cast("Any", kind)) if f.init}
    hints = _hints(typing.cast("Any", kind))
    for key in options:
        if key not in fields:
            raise SchemeError(f"{where} has no option {key!r}.{did_you_mean(str(key), fields)}")
    for name, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and name not in options:
            raise SchemeError(f"{where} needs the option {name!r}.")
    return kind(**{key: _value(value, hints[key], f"{where}: {key}") for key, value in options.items()})


def check_types(made: Any, where: str) -> None:
    """Raise SchemeError for a field of a dataclass that isn't as annotated; ``where`` as of :func:`build`."""
    kind: Any = type(made)
    for name, hint in _hints(kind).items():
        _value(getattr(made, name), hint, f"{where}: {name}")


def at_least_one(**sizes: int | None) -> None:
    """Raise UsageError for a size below 1, by its name; None is none."""
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; it must be 1 or more.")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _value(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the annotation wants it, or SchemeError."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _either(value, inner, hint, where)
    if origin is Literal:
        if value not in inner or isinstance(value, bool) != any(isinstance(item, bool) for item in inner):
            raise SchemeError(f"{where} is {' or '.join(map(str, inner))}; got {value!r}.{_close(value, inner)}")
        return value
    if origin is tuple:
        return _tuple(value, inner, where)
    if origin in (dict, collections.abc.Mapping):
        if not isinstance(value, Mapping):
            raise SchemeError(f"{where} is a mapping; got {value!r}.")
        return {str(key): _value(item, inner[1], f"{where}.{key}") for key, item in value.items()}
    if getattr(hint, "registry", None) is not None:
        return _part(value, hint.registry, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise SchemeError(f"{where} is a mapping of options; got {value!r}.")
        return build(hint, value, where)
    return _plain_value(value, hint, where)


def _plain_value(value: Any, hint: Any, where: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and number:
        if not math.isfinite(value):
            raise SchemeError(f"{where} is a finite number; got {value!r}.")
        return float(value)
    if hint is type(None) and value is None:
        return None
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    name = "nothing" if hint is type(None) else getattr(hint, "__name__", str(hint))
    raise SchemeError(f"{where} is {'an' if name[0] in 'aeiou' else 'a'} {name}; got {value!r}.")


def _either(value: Any, inner: tuple[Any, ...], hint: Any, where: str) -> Any:
    if value is None and type(None) in inner:
        return None
    wanted = [kind for kind in inner if kind is not type(None)]
    if len(wanted) == 1:
        return _value(value, wanted[0], where)
    for kind in wanted:
        try:
            return _value(value, kind, where)
        except SchemeError:
            continue
    raise SchemeError(f"{where} is {' or '.join(getattr(k, '__name__', str(k)) for k in wanted)}; got {value!r}.")


def _tuple(value: Any, inner: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise SchemeError(f"{where} is a list; got {value!r}.")
    kinds = [inner[0]] * len(value) if len(inner) == 2 and inner[1] is ... else list(inner)
    if len(kinds) != len(value):
        raise SchemeError(f"{where} is a list of {len(kinds)} values; got {len(value)}.")
    return tuple(_value(item, kind, f"{where}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True)))


def _part(value: Any, registry: Any, where: str) -> Any:
    if not isinstance(value, str | Mapping) and dataclasses.is_dataclass(value):
        return value  # made in Python
    return registry.make(*named(value, registry.kind, where))


def named(value: Any, kind: str, where: str) -> tuple[str, Mapping[str, Any]]:
    """A part's name and options, from a name or ``{name: {option: value}}``.

    Raises:
        SchemeError: anything else.
    """
    if isinstance(value, str):
        return value, {}
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, options),) = value.items()
        if isinstance(options, Mapping) or options is None:
            return str(name), options or {}
    raise SchemeError(f"{where} is the name of a {kind}, or {{name: {{option: value}}}}; got {value!r}.")


def _close(value: Any, options: tuple[Any, ...]) -> str:
    return did_you_mean(value, map(str, options)) if isinstance(value, str) else ""
