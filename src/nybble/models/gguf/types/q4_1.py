"""Q4_1: 32 four-bit codes, a float16 scale and minimum."""

from nybble.models.gguf.types import BlockType
from nybble.models.gguf.types._fields import Plane, Raw

PART = BlockType(
    number=3,
    block=32,
    line="q4_1",
    fields=(Raw("d"), Raw("m"), Plane("codes", 16, bits=4, run=16)),
)
