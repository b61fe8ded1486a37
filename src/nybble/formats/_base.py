"""NumberFormat: a finite set of values with codes; everything else is computed from it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import numpy as np

from nybble.core.errors import FormatError
from nybble.rounding import Rounding, get_rounding


@dataclass(frozen=True)
class NumberFormat(ABC):
    """A record from which the list of values follows.

    Attributes:
        name: canonical name (ml_dtypes' where it has one).
        bits: width of a code; codes run over ``0 .. 2**bits - 1`` as unsigned bit patterns.
        aliases: other names that :func:`~nybble.formats.get_format` accepts.
    """

    name: str
    bits: int
    aliases: tuple[str, ...] = field(default=(), compare=False)

    @abstractmethod
    def decode_table(self) -> np.ndarray:
        """float64 [2**bits]: the value of each code, in code order; NaN and +-inf where the format has them."""

    def encodable(self) -> np.ndarray:
        """Which codes an encoder may produce: bool [2**bits] (INT4 symmetric leaves -8 out)."""
        return np.asarray(np.isfinite(self.values))

    @cached_property
    def values(self) -> np.ndarray:
        """:meth:`decode_table`, cached and read-only."""
        table = np.asarray(self.decode_table(), dtype=np.float64)
        table.flags.writeable = False
        return table

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct encodable values ascending, and a code for each; of two zeros the positive one."""
        codes = np.flatnonzero(self.encodable())
        values = self.values[codes]
        order = np.lexsort((codes, np.signbit(values) & (values == 0), values))
        values, codes = values[order], codes[order]
        first = np.append(True, values[1:] != values[:-1])
        return values[first] + 0.0, codes[first]

    @property
    def grid(self) -> np.ndarray:
        """float64, distinct encodable values in ascending order."""
        return self._sorted[0]

    @property
    def grid_codes(self) -> np.ndarray:
        """The code of each value of :attr:`grid`."""
        return self._sorted[1]

    @cached_property
    def reach(self) -> tuple[float, float]:
        """Half a step beyond the smallest and the largest value, in float32: where rounding to them ends."""
        grid = self.grid.astype(np.float32)
        with np.errstate(over="ignore"):
            return float(grid[0] - (grid[1] - grid[0]) / 2), float(grid[-1] + (grid[-1] - grid[-2]) / 2)

    @cached_property
    def in_ones(self) -> bool:
        """Whether each value is the one before it plus 1, as integers are."""
        return bool((np.diff(self.grid) == 1).all())

    @cached_property
    def has_zero(self) -> bool:
        """Whether 0 is one of the values that an encoder produces."""
        return bool((self.grid == 0).any())

    @cached_property
    def negative_zero(self) -> int | None:
        """The code of -0.0, or None."""
        found = np.flatnonzero(self.encodable() & (self.values == 0) & np.signbit(self.values))
        return int(found[0]) if len(found) else None

    @cached_property
    def produced(self) -> frozenset[int]:
        """The codes that an encoder produces for numbers: one for each value of the grid, and -0."""
        zero = set() if self.negative_zero is None else {self.negative_zero}
        return frozenset(zero | {int(code) for code in self.grid_codes})

    @cached_property
    def nan_code(self) -> int | None:
        """The lowest code that means NaN, or None."""
        found = np.flatnonzero(np.isnan(self.values))
        return int(found[0]) if len(found) else None

    @property
    def max(self) -> float:
        """Largest finite value."""
        return float(self.grid[-1])

    @property
    def min(self) -> float:
        """Smallest (most negative) finite value."""
        return float(self.grid[0])

    @cached_property
    def absmax(self) -> float:
        """Largest magnitude: what the largest element of a block is scaled to."""
        return float(np.abs(self.grid).max())

    @property
    def signed(self) -> bool:
        """Whether any value is negative."""
        return self.min < 0

    @cached_property
    def smallest(self) -> float:
        """Smallest magnitude above zero (subnormals included)."""
        return float(np.abs(self.grid[self.grid != 0]).min())

    @property
    def min_normal(self) -> float:
        """Smallest normal value of a floating-point format; elsewhere :attr:`smallest`."""
        return self.smallest

    @property
    def is_integer(self) -> bool:
        """Whether decode(code) - zero_point makes sense: evenly spaced integers."""
        return False

    @property
    def exponent_bits(self) -> int | None:
        """Width of the exponent, where there is one."""
        return None

    @property
    def encoder_thresholds(self) -> np.ndarray | None:
        """float32 thresholds that the format's own encoder publishes (``code rank = #(t <= x)``), or None."""
        return None

    def thresholds(self, rounding: str = "nearest-even") -> np.ndarray:
        """float32 [len(grid) - 1]: ``rank(x) = how many of them are <= x``, exactly, for every float32 x.

        Each is the smallest float32 that rounds to the upper neighbour.
        """
        return _thresholds(self, rounding)

    def __str__(self) -> str:
        return self.name


@cache
def _thresholds(fmt: NumberFormat, rounding_name: str) -> np.ndarray:
    rounding: Rounding = get_rounding(rounding_name)
    if rounding.native:
        own = fmt.encoder_thresholds
        if own is None:
            raise FormatError(f"{fmt.name} publishes no encoder thresholds; use rounding=nearest-even.")
        return own
    if rounding.tie_up is None:
        raise FormatError(f"rounding={rounding_name} has no thresholds.")
    lower, upper = fmt.grid[:-1], fmt.grid[1:]
    lower_even, upper_even = fmt.grid_codes[:-1] % 2 == 0, fmt.grid_codes[1:] % 2 == 0
    # Neighbouring codes of one parity (bitsandbytes' permuted FP4, a missing code): the even one is undefined, so
    # the tie goes to the smaller magnitude.
    even = np.where(lower_even == upper_even, np.abs(upper) < np.abs(lower), upper_even)
    middle = lower / 2 + upper / 2
    if rounding.float32_middle:
        middle = middle.astype(np.float32).astype(np.float64)
    with np.errstate(over="ignore"):
        nearest = middle.astype(np.float32)
    above = np.where(nearest.astype(np.float64) >= middle, nearest, np.nextafter(nearest, np.float32(np.inf)))
    tied = nearest.astype(np.float64) == middle
    up = np.broadcast_to(np.asarray(rounding.tie_up(lower, upper, even)), middle.shape)
    result = np.where(tied & ~up, np.nextafter(above, np.float32(np.inf)), above).astype(np.float32)
    result.flags.writeable = False
    return result


@dataclass(frozen=True)
class TableFormat(NumberFormat):
    """A format given by its values in code order (a code book of scalars).

    Args:
        table: 2**bits values, or fewer: missing codes repeat the last value and are never produced.
        native_thresholds: the encoder's own thresholds, if it publishes any.
    """

    table: tuple[float, ...] = ()
    native_thresholds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise FormatError(f"{self.name}: a table has 1 to 8 bits; got {self.bits}.")
        if not 2 <= len(self.table) <= 2**self.bits:
            raise FormatError(
                f"{self.name}: {len(self.table)} values do not fit {self.bits} bits (2 to {2**self.bits})."
            )
        if not np.isfinite(self.table).all():
            raise FormatError(f"{self.name}: a table holds finite values only.")
        if len(set(self.table)) < 2:
            raise FormatError(f"{self.name}: a table needs two different values.")

    def decode_table(self) -> np.ndarray:
        given = np.array(self.table, np.float32).astype(np.float64)
        return np.append(given, np.full(2**self.bits - len(given), given[-1]))

    def encodable(self) -> np.ndarray:
        return np.arange(2**self.bits) < len(self.table)

    @property
    def encoder_thresholds(self) -> np.ndarray | None:
        return None if self.native_thresholds is None else np.array(self.native_thresholds, np.float32)


@dataclass(frozen=True)
class Family:
    """Formats that a pattern spells.

    Attributes:
        pattern: regular expression for the whole name.
        build: makes the member from the match; raises FormatError when it can't exist.
        listed: members worth a line in ``nybble formats`` (and tested whole).
        aliases: other names of members -> theirs.
    """

    pattern: str
    build: Callable[[re.Match[str]], NumberFormat]
    listed: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def match(self, name: str) -> NumberFormat | None:
        """The member called ``name``, or None if neither the pattern nor an alias spells it."""
        found = re.fullmatch(self.pattern, self.aliases.get(name, name))
        if found is None:
            return None
        made = self.build(found)
        return replace(made, aliases=tuple(alias for alias, member in self.aliases.items() if member == made.name))


def float32_steps(first: float, last: float, cells: int) -> np.ndarray:
    """float32 [cells + 1]: ``first`` .. ``last`` in float32 steps from the nearer end, as torch.linspace makes them.

    Others wrote files with codes of tables made so; evenly spaced in float64, some values differ in their last bit.
    """
    begin, end = np.float32(first), np.float32(last)
    step = float((end - begin) / np.float32(cells))
    i = np.arange(cells + 1)
    steps = np.where(i < (cells + 1) // 2, float(begin) + step * i, float(end) - step * (cells - i))
    return steps.astype(np.float32)
