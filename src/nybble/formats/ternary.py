"""Ternary: 0, +1, -1 in two bits of two's complement (-2 unused); five to a byte with ``packing=base3``.

b1.58 (Ma et al. 2024, arXiv:2402.17764): ``ternary tensor scale=mean``, code = clamp(round(w / mean|w|), -1, 1).
"""

from nybble.formats.integer import IntFormat

PART = IntFormat("ternary", 2)
