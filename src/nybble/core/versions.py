"""nybble's own version, and those of what may change a number."""

from __future__ import annotations

import platform
from importlib.metadata import version

VERSION = "0.1.0"


def versions() -> dict[str, str]:
    """Of nybble, Python, torch and transformers; those may change a number."""
    return {
        "nybble": VERSION,
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
