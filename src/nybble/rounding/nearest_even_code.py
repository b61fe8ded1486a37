"""Ties to the even code *after* the integer zero point is added: ``round(x / scale + zero_point)``.

That is compressed-tensors' order. Without a zero point the same as nearest-even.
"""

from nybble.rounding import Rounding

PART = Rounding("nearest-even-code", lambda lower, upper, upper_is_even: upper_is_even, zero_inside=True)
