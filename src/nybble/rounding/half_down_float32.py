"""Ties toward -infinity at midpoints rounded to float32, ``bucketize(x, (table[1:] + table[:-1]) / 2)``.

bitsandbytes' own 4-bit encoder off the GPU.
"""

from nybble.rounding import Rounding

PART = Rounding("half-down-float32", lambda lower, upper, upper_is_even: upper != upper, float32_middle=True)
