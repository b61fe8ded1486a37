"""Where a sweep's workers run. One executor a file.

A file defines ``PART``, a dataclass that is an :class:`Executor`. Other packages add some through entry points of the
group ``nybble.lab.executors``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from nybble.core.options import at_least_one
from nybble.core.registry import Registry
from nybble.lab.store import Store
from nybble.lab.worker import Patience

REGISTRY = Registry(
    "nybble.lab.executors", "executor", lambda part: isinstance(part, type) and issubclass(part, Executor)
)
BARREN = 3
"""Workers that may die in a row without one run having been finished."""


@dataclass(frozen=True, kw_only=True)
class Executor(ABC):
    """Starts workers, sees them die, and starts others.

    Attributes:
        workers: how many at a time.
    """

    registry: ClassVar[Any] = REGISTRY

    workers: int = 1

    def __post_init__(self) -> None:
        at_least_one(workers=self.workers)

    @abstractmethod
    def run(self, store: Store, sweep: str | None, patience: Patience, tell: Callable[[], None] = lambda: None) -> None:
        """Return when no run of the sweep is queued or running any more.

        Args:
            store: where the runs are; workers open it by its place.
            sweep: whose runs; None: all.
            patience: times.
            tell: called every now and then.

        Raises:
            StoreError: the store can't be reached any more, or workers die without having run anything.
        """
