"""Q1_0: 128 signs under a float16 scale."""

from nybble.models.gguf.types import WritableType
from nybble.models.gguf.types._fields import Plane, Raw

PART = WritableType(
    number=41,
    block=128,
    line="q1_0",
    fields=(Raw("d"), Plane("codes", 16, bits=1, run=1)),
)
