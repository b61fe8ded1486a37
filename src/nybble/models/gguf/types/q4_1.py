"""Q4_1: 32 four-bit codes, a float16 scale and minimum."""

from nybble.models.gguf.types import WritableType
from nybble.models.gguf.types._fields import Pairs, Raw

PART = WritableType(
    number=3,
    block=32,
    line="q4_1",
    fields=(Raw("d"), Raw("m"), Pairs("codes", 16, run=16)),
)
