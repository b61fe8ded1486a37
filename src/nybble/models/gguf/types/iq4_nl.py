"""IQ4_NL: 32 codes of a table of sixteen integers under a float16 scale."""

from nybble.models.gguf.types import WritableType
from nybble.models.gguf.types._fields import Pairs, Raw

PART = WritableType(
    number=20,
    block=32,
    line="iq4_nl",
    fields=(Raw("d"), Pairs("codes", 16, run=16)),
)
