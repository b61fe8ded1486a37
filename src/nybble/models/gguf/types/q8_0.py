"""Q8_0: 32 eight-bit integers under a float16 scale."""

from nybble.models.gguf.types import WritableType
from nybble.models.gguf.types._fields import Raw

PART = WritableType(
    number=8,
    block=32,
    line="q8_0",
    fields=(Raw("d"), Raw("codes", 32)),
)
