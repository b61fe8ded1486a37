"""Ties to the even code at midpoints rounded to float32: the tree search of bitsandbytes' 8-bit CUDA encoder.

The search ends on an even code and moves on only if x is strictly past ``(lower + upper) * 0.5``.
"""

from nybble.rounding import Rounding

PART = Rounding("nearest-even-float32", lambda lower, upper, upper_is_even: upper_is_even, float32_middle=True)
