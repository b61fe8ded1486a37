"""Ties toward -infinity: the lower neighbour, as a table search that keeps the first minimum."""

from nybble.rounding import Rounding

PART = Rounding("half-down", lambda lower, upper, upper_is_even: upper != upper)
