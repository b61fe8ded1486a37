"""IQ4_NL: 32 codes of a table of sixteen integers under a float16 scale."""

from nybble.models.gguf.types import BlockType
from nybble.models.gguf.types._fields import Plane, Raw

PART = BlockType(
    number=20,
    block=32,
    line="iq4_nl",
    fields=(Raw("d"), Plane("codes", 16, bits=4, run=16)),
)
