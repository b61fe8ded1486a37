"""How much a found network may have of something, in whole units: sums are exact, and a budget is met or isn't."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from nybble.core.errors import UsageError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Budget:
    """See the module.

    Attributes:
        name: ``parameters``. unit: for people.
        amount: up to 1 a share of what the full network has, as the decimal that was typed; above 1 a count.
    """

    name: str
    unit: str
    amount: Fraction

    def limit(self, full: int) -> int:
        """The most, of a network that has ``full`` units.

        >>> Budget(name="parameters", unit="parameters", amount=Fraction("0.7")).limit(10)
        7
        """
        return math.floor(self.amount * full if self.amount <= 1 else self.amount)

    def check(self, least: int, full: int) -> None:
        """Refuse a limit that nothing meets.

        Args:
            least: of any network of the space.
            full: as of :meth:`limit`.

        Raises:
            UsageError: the message has the least.
        """
        if self.limit(full) < least:
            raise UsageError(
                f"a budget of {self.limit(full):,} {self.unit} ({self.name}={float(self.amount):g}) is infeasible in "
                f"this space; the least is {least:,}, {least / max(1, full):.3f} of the full network's {full:,}."
            )


def parse_budget(text: str, units: Mapping[str, str]) -> Budget:
    """``parameters=0.6`` as a Budget.

    Args:
        text: a name and a number.
        units: the names that a method takes, and their units.

    Raises:
        UsageError: not of this form, another name, or no number above 0.
    """
    name, _, number = (word.strip() for word in text.partition("="))
    if name not in units:
        raise UsageError(
            f"a budget of this method is {' or '.join(units)}=NUMBER; got {text!r}.{did_you_mean(name, units)}"
        )
    try:
        amount = Fraction(number)
    except (ValueError, ZeroDivisionError):
        amount = Fraction(0)
    if amount <= 0:
        raise UsageError(
            f"a budget is a number above 0: up to 1 a share of the full network ({name}=0.6), above it a count; "
            f"got {text!r}."
        )
    return Budget(name=name, unit=units[name], amount=amount)
