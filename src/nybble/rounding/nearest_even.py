"""Ties to the even code (IEEE 754 roundTiesToEven); the default everywhere."""

from nybble.rounding import Rounding

PART = Rounding("nearest-even", lambda lower, upper, upper_is_even: upper_is_even)
