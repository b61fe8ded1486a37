"""Loops: losses, costs and a limit become a choice. One a file, whose ``PART`` is a dataclass that is a :class:`Loop`.

A loop is deterministic, and its choice is within the limit. Other packages add loops through entry points of the group
``nybble.search.loops``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from nybble.core.registry import Registry
from nybble.search.problem import Choice, Problem

REGISTRY = Registry(
    "nybble.search.loops", "search loop", lambda part: isinstance(part, type) and issubclass(part, Loop)
)


@dataclass(frozen=True, kw_only=True)
class Loop(ABC):
    """A way to choose.

    Attributes:
        near: whether its choice loses hardly more than the best one; others follow a paper's steps, or are for rewards
            that are noisy.
    """

    registry: ClassVar[Any] = REGISTRY
    near: ClassVar[bool] = True

    @abstractmethod
    def solve(self, problem: Problem) -> Choice:
        """A choice within the limit.

        Raises:
            UsageError: there is none (:meth:`Problem.check`), or a package that the loop needs is missing.
        """
