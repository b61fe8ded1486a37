"""Ties toward +infinity (``floor(x + 0.5)``)."""

from nybble.rounding import Rounding

PART = Rounding("half-up", lambda lower, upper, upper_is_even: upper == upper)
