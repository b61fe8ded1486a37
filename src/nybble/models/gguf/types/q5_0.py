"""Q5_0: 32 five-bit integers under a float16 scale; the fifth bits stand together."""

from nybble.models.gguf.types import WritableType
from nybble.models.gguf.types._fields import Plane, Raw

PART = WritableType(
    number=6,
    block=32,
    line="q5_0",
    fields=(Raw("d"), Plane("codes", 4, bits=1, run=1, shift=4), Plane("codes", 16, bits=4, run=16)),
    flips={"codes": 16},
)
