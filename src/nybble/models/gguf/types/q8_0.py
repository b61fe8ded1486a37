"""Q8_0: 32 eight-bit integers under a float16 scale."""

from nybble.models.gguf.types import BlockType
from nybble.models.gguf.types._fields import Raw

PART = BlockType(
    number=8,
    block=32,
    line="q8_0",
    fields=(Raw("d"), Raw("codes", 32)),
)
