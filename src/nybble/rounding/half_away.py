"""Ties away from zero (C's ``round``; the Microsoft MX emulation's default; GGUF's Q8_0)."""

from nybble.rounding import Rounding

PART = Rounding("half-away", lambda lower, upper, upper_is_even: lower + upper > 0)
