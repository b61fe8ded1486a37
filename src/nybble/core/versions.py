"""nybble's own version, those of what may change a number, and those of optional packages."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version

from nybble.core.errors import UsageError

VERSION = "0.1.0"


def versions() -> dict[str, str]:
    """Of nybble, Python, torch and transformers; those may change a number."""
    return {
        "nybble": VERSION,
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def at_least(package: str, oldest: tuple[int, ...], *, needs: str, install: str, why: str = "") -> str:
    """The version of an optional package; nothing is imported.

    Args:
        package: its name where packages are installed from.
        oldest: the first version that will do.
        needs: who needs it: "tasks need EleutherAI's lm-evaluation-harness".
        install: how to get it.
        why: an older one won't do.

    Raises:
        UsageError: it is missing or too old.
    """
    try:
        found = version(package)
    except PackageNotFoundError:
        raise UsageError(f"{needs}: {install}") from None
    if tuple(int(number) for number in re.findall(r"\d+", found)[: len(oldest)]) < oldest:
        raise UsageError(f"{package} {found} is too old{why and ', '}{why}: {install}")
    return found
