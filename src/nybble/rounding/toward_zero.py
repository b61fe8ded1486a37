"""Ties toward zero (a first-minimum search over magnitudes, as GGUF's MXFP4 encoder)."""

from nybble.rounding import Rounding

PART = Rounding("toward-zero", lambda lower, upper, upper_is_even: lower + upper < 0)
