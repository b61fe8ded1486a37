"""Unbiased rounding: up with probability (x - lower) / (upper - lower); grid values never move."""

from nybble.rounding import Rounding

PART = Rounding("stochastic", stochastic=True)
