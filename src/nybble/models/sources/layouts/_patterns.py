"""Patterns of module names that a file brings: matched without waiting for ever."""

from __future__ import annotations

import re
from functools import lru_cache

from nybble.core.errors import FileError

_LONGEST, _OPEN = 2000, 6
_REPEATS = ("*", "+", "{", "?")


@lru_cache(maxsize=256)
def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression that is done in milliseconds on the name of a module.

    A backtracking matcher needs time exponential in a name's length where what repeats holds what repeats, and a power
    of it as high as there are repeats in a row.

    Raises:
        FileError: it is none, or could take for ever.
    """
    try:
        found = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise FileError(f"{pattern!r:.80} is no regular expression ({error}).") from error
    if len(pattern) > _LONGEST or _takes_long(pattern):
        raise FileError(f"{pattern!r:.80} could take for ever to match; name the modules, or write it more simply.")
    return found


def named(name: str, target: str) -> bool:
    """Whether a target of compressed-tensors, a name or a pattern, is for a module."""
    pattern = target.removeprefix("re:")
    return name == target or (pattern != target and compiled(pattern).match(name) is not None)


def is_class(target: str) -> bool:
    """A class can't be seen in the files; names are dotted, or begin with "re:", and classes are neither."""
    return "." not in target and not target.startswith("re:")


def _takes_long(pattern: str) -> bool:
    """Whether a group that repeats holds repeats, or alternatives, or more than a few repeats have no end."""
    plain = re.sub(r"\\.", "a", pattern)
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "a", plain)
    plain = plain.replace("(?", "(")
    inside: list[bool] = [False]
    unbounded = 0
    for place, sign in enumerate(plain):
        after = plain[place + 1 : place + 2]
        if sign == "(":
            inside.append(False)
        elif sign == ")" and len(inside) > 1:
            held = inside.pop()
            if held and after in ("*", "+", "{"):
                return True
            inside[-1] |= held
        elif sign in _REPEATS or sign == "|":
            inside[-1] = True
            unbounded += sign in "*+{"
    return unbounded > _OPEN or bool(re.search(r"\\[1-9]|\(\?P=", pattern) and unbounded > 1)
