"""Which values exist: number formats by name.

A module of this folder is one format (``PART`` is a NumberFormat) or one family whose members are spelled by a pattern
(``PART`` is a Family: ``int4``, ``float6_e3m2fn``). Names are those of ml_dtypes where it has one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from nybble.core.errors import FormatError, did_you_mean
from nybble.core.registry import Registry
from nybble.formats._base import Family, NumberFormat, TableFormat

REGISTRY = Registry("nybble.formats", "number format", lambda part: isinstance(part, NumberFormat | Family))

__all__ = ["Family", "NumberFormat", "TableFormat", "closest", "format_names", "get_format"]


@cache
def get_format(name: str) -> NumberFormat:
    """Return the format called ``name`` (a name, an alias, or any member of a family).

    >>> get_format("e2m1").name
    'float4_e2m1fn'

    Raises:
        FormatError: unknown name (with the closest one) or a member that can't exist (``int9``).
    """
    for part in REGISTRY.all().values():
        if isinstance(part, Family):
            made = part.match(name)
            if made is not None:
                return made
        elif name == part.name or name in part.aliases:
            found: NumberFormat = part
            return found
    raise FormatError(f"unknown number format {name!r}.{closest(name, format_names())} `nybble formats` lists them.")


def closest(name: str, known: Iterable[str]) -> str:
    """What to say of an unknown name: formats that it begins (``fp6``), that 32 bits are none, or the closest name.

    A number of bits alone (``4``, ``4bit``, ``w4``) is an integer's or a float's.
    """
    bits = re.fullmatch(r"[wq]?([1-9])[ _-]?(b|bit|bits)?", name)
    if bits is not None:
        likely = [each for each in known if re.match(rf"(int|float){bits[1]}(_|$)", each) and "finite" not in each]
        if likely:
            likely.sort(key=lambda each: (not each.startswith("int"), len(each)))
            return f" Did you mean {' or '.join(repr(each) for each in likely[:3])}?"
    wide = re.fullmatch(r"(fp|float|tf|double|bfloat|bf)(19|32|64)?", name)
    if wide is not None and (wide[2] or name == "double"):
        return " That is what tensors are without quantization; formats have 16 bits or less."
    begun = [each for each in known if each.startswith(re.sub("^fp", "float", name))] if len(name) > 1 else []
    if begun:
        begun.sort(key=lambda each: each.endswith("_finite"))  # the standard ones first
        return f" Did you mean {' or '.join(repr(each) for each in begun[:3])}?"
    return did_you_mean(name, known)


def format_names() -> list[str]:
    """Every listed format: the single ones and the families' listed members."""
    names: list[str] = []
    for part in REGISTRY.all().values():
        names += part.listed if isinstance(part, Family) else [part.name]
    return sorted(names)
