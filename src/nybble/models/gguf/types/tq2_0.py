"""TQ2_0: 256 codes of two bits under a float16 scale; -1, 0, 1, and 2, which llama.cpp reads and does not write."""

from nybble.models.gguf.types import WritableType
from nybble.models.gguf.types._fields import Plane, Raw

PART = WritableType(
    number=35,
    block=256,
    line="tq2_0",
    fields=(Plane("codes", 64, bits=2, run=32), Raw("d")),
)
