"""Q5_1: 32 five-bit codes, a float16 scale and minimum."""

from nybble.models.gguf.types import WritableType
from nybble.models.gguf.types._fields import Plane, Raw

PART = WritableType(
    number=7,
    block=32,
    line="q5_1",
    fields=(Raw("d"), Raw("m"), Plane("codes", 4, bits=1, run=1, shift=4), Plane("codes", 16, bits=4, run=16)),
)
