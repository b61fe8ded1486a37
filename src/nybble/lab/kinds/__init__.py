"""What a run of a sweep does. One kind a file.

A file defines ``PART``, a dataclass that is a :class:`RunKind`: its fields are the options, axes of a sweep. Other
packages add kinds through entry points of the group ``nybble.lab.kinds``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nybble.core.registry import Registry

REGISTRY = Registry(
    "nybble.lab.kinds", "kind of run", lambda part: isinstance(part, type) and issubclass(part, RunKind)
)


@dataclass(frozen=True, kw_only=True)
class RunKind(ABC):
    """One run.

    Attributes:
        VERSION: to be raised when the same options come to mean another result, a changed default included: old runs
            stay as they are, and new ones are others.
        FILES: options that may name local files or folders, whose contents decide the result.
    """

    registry: ClassVar[Any] = REGISTRY
    VERSION: ClassVar[int] = 1
    FILES: ClassVar[tuple[str, ...]] = ()

    def check(self) -> None:  # noqa: B027  (a kind needn't refuse anything)
        """Refuse what can't be run, quickly: it is asked of every run of a sweep, and no model is opened.

        Raises:
            UsageError: options that don't go together; the sweep lists the run and leaves it out.
        """

    @abstractmethod
    def run(self, folder: Path) -> Mapping[str, Any]:
        """Do it.

        Args:
            folder: an empty one, removed afterwards.

        Returns:
            What is kept: names to numbers, texts or None.

        Raises:
            UsageError: it turns out that the options don't go together (a group that doesn't divide the columns).
            Anything else is a failure, kept with the run.
        """
