"""Sources that are drawn, and not read: ``scenes:COUNT[:SEED]``, ``voices:COUNT[:SEED]``."""

from __future__ import annotations

import re

import numpy as np

from nybble.core.errors import UsageError
from nybble.core.seeds import derive_seed
from nybble.data.text import Part


def drawn(src: str, word: str) -> tuple[int, int]:
    """Count and seed of a SRC.

    Raises:
        UsageError: it is not ``word`` with a count above 0, and perhaps a seed.
    """
    found = re.fullmatch(rf"{word}:([1-9]\d*)(?::(\d+))?", src)
    if found is None:
        raise UsageError(
            f"data {src!r}: this model's examples are drawn; say {word}:COUNT, or {word}:COUNT:SEED for other ones "
            f"({word}:2000, {word}:500:7)."
        )
    return int(found[1]), int(found[2] or 0)


def numbers(word: str, seed: int, part: Part, at: int) -> np.random.Generator:
    """What example ``at`` is drawn with; to train on and to judge on are different examples of one seed."""
    return np.random.default_rng(derive_seed(seed, word, part, str(at)))
