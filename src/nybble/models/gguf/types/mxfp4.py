"""MXFP4: 32 E2M1 values under a power of two (OCP MX v1.0).

An exponent byte of 255 is NaN, as OCP has it; ggml takes 2^127 for it, and writes none.
"""

from nybble.models.gguf.types import WritableType
from nybble.models.gguf.types._fields import Pairs, Raw

PART = WritableType(
    number=39,
    block=32,
    line="mxfp4",
    fields=(Raw("scale", 1), Pairs("codes", 16, run=16)),
)
