"""IQ4_NL: 32 codes of a table of sixteen integers under a float16 scale."""

from nybble.models.gguf.types import WritableType
from nybble.models.gguf.types._fields import Plane, Raw

PART = WritableType(
    number=20,
    block=32,
    line="iq4_nl",
    fields=(Raw("d"), Plane("codes", 16, bits=4, run=16)),
)
