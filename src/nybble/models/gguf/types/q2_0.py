"""Q2_0: 64 codes of two bits, -1 to 2, under a float16 scale."""

from nybble.models.gguf.types import WritableType
from nybble.models.gguf.types._fields import Plane, Raw

PART = WritableType(
    number=42,
    block=64,
    line="q2_0",
    fields=(Raw("d"), Plane("codes", 16, bits=2, run=1)),
)
