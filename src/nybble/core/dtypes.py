"""The dtypes that models compute in, by name or as torch's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nybble.core.errors import UsageError

if TYPE_CHECKING:
    import torch

FLOATS = ("float32", "bfloat16", "float16")


def float_dtype(given: torch.dtype | str, what: str) -> torch.dtype:
    """Torch's dtype of a name: ``float32``, ``bfloat16`` or ``float16``; one of these dtypes as it is.

    Raises:
        UsageError: something else; ``what`` is what it was given as.
    """
    name = str(given).removeprefix("torch.")
    if name not in FLOATS:
        raise UsageError(f"{what} is {given!r}; give {', '.join(FLOATS[:-1])} or {FLOATS[-1]}, as a name or torch's.")
    import torch  # takes seconds, which a word that names no dtype needn't wait for

    found: torch.dtype = getattr(torch, name)
    return found
