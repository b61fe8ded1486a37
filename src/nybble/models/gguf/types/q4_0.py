"""Q4_0: 32 four-bit integers under a float16 scale."""

from nybble.models.gguf.types import WritableType
from nybble.models.gguf.types._fields import Pairs, Raw

PART = WritableType(
    number=2,
    block=32,
    line="q4_0",
    fields=(Raw("d"), Pairs("codes", 16, run=16)),
    flips={"codes": 0x88},
)
