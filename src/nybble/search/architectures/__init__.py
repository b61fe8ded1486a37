"""Searches of an architecture: which widths, tokens, operations or experts a network has. One a file.

A file defines ``PART``, a dataclass that is an :class:`Architecture`; its fields are its options in a recipe
(``architecture: {vit-slim: {...}}``). :mod:`._study` is what it works with and what it gives, :mod:`._budget` how much
the found network may have. Other packages add methods through entry points of the group
``nybble.search.architectures``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nybble.core.registry import Registry
from nybble.search.architectures._budget import Budget
from nybble.search.architectures._study import Found, Study, Training

__all__ = ["REGISTRY", "Architecture", "Budget", "Found", "Study", "Training"]

REGISTRY = Registry(
    "nybble.search.architectures", "architecture search", lambda part: issubclass_of(part, Architecture)
)


@dataclass(frozen=True, kw_only=True)
class Architecture(ABC):
    """A way to search.

    Attributes:
        budgets: what a budget may be of, each with its unit for people.
        begins_with: ``model``, which is searched in or teaches; or ``space``: MODEL is a YAML file that says what is
            searched, and nothing is trained before.
    """

    registry: ClassVar[Any] = REGISTRY
    budgets: ClassVar[Mapping[str, str]]
    begins_with: ClassVar[str] = "model"

    def check(self, study: Study) -> None:  # noqa: B027 - options are right by their types, most studies as well
        """Refuse, before anything is written, what doesn't fit: the model, the data, the budget.

        Raises:
            NybbleError: names it, and a way out; of a budget that nothing meets the least.
        """

    @abstractmethod
    def run(self, study: Study) -> Found:
        """Search, and train what was found as far as the method does.

        The same study gives the same result; what takes long is kept (:attr:`Study.keep`, :meth:`Study.train`), so that
        a run that was killed goes on.

        Raises:
            NybbleError: as :meth:`check`; LearningError: a loss is no number.
        """


def issubclass_of(part: Any, kind: type) -> bool:
    """Whether it is a class of that kind."""
    return isinstance(part, type) and issubclass(part, kind)
