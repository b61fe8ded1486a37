"""Every error that nybble raises on purpose.

An error names the thing, what was asked, what came, and a way out. It is wrapped once, with the layer or
file, on its way up (:func:`within`). Anything else that escapes from nybble is a bug.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

_LISTED, _SHOWN, _NEAR = 24, 8, 4
_SIZED = re.compile(r"([a-z]+)_?(\d+)")


class NybbleError(Exception):
    """Base of all errors a user can cause; the command line prints its text and exits with 1 (or 2, see UsageError)."""


class UsageError(NybbleError):
    """The request itself is wrong: an unknown name, a malformed line, contradicting options. Exit code 2."""


class FormatError(UsageError):
    """A number format can't be made or can't do what was asked of it."""


class GranularityError(UsageError):
    """A tensor's shape can't be cut as a granularity asks."""


class SchemeError(UsageError):
    """A scheme or recipe contradicts itself or the model: a pattern that matches nothing, say."""


class DataError(NybbleError):
    """Text or tensors that can't be used: empty, too short, NaN."""


class TokenError(DataError, IndexError):
    """A token that a model has no embedding for."""


class LearningError(DataError):
    """Training that came to no number."""


class ModelError(NybbleError):
    """A model that can't be read or is of a kind that the request can't serve."""


class FileError(NybbleError):
    """A file that is missing, truncated, malformed, in the way, or can't be written."""


class StoreError(NybbleError):
    """A database of runs that can't be reached, read or written."""


class DeviceError(NybbleError):
    """A device that isn't there or has too little memory."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest option, or a list of what exists (its start, if it is long).

    >>> did_you_mean("gtpq", ["rtn", "gptq"])
    " Did you mean 'gptq'?"
    """
    known = sorted(options)
    lower = {option.lower(): option for option in reversed(known)}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {lower[close[0]]!r}?"
    if near := _near_in_size(name, known):
        return f" Nearest: {', '.join(near)}."
    if len(known) > _LISTED:
        return f" Some of the {len(known)} known: {', '.join(known[:_SHOWN])} ..."
    return f" Known: {', '.join(known)}."


def _near_in_size(name: str, known: Sequence[str]) -> list[str]:
    """Those of ``known`` with the letters that ``name`` begins with, nearest in the number behind them: q9, q8_0."""
    sizes = {option: _SIZED.match(option.lower()) for option in (name, *known)}
    asked = sizes[name]
    if asked is None:
        return []
    alike = [(option, found) for option in known if (found := sizes[option]) is not None and found[1] == asked[1]]
    alike.sort(key=lambda pair: abs(int(pair[1][2]) - int(asked[2])))
    return [option for option, _ in alike[:_NEAR]]


@contextmanager
def within(place: str) -> Iterator[None]:
    """Prefix a NybbleError raised inside with where it happened, once.

    The error keeps its class, so a caller can still tell a usage error from a broken file.
    """
    try:
        yield
    except NybbleError as error:
        if getattr(error, "_placed", False):
            raise
        placed = type(error)(f"{place}: {error}")
        placed._placed = True  # type: ignore[attr-defined]
        raise placed from error
