"""TQ1_0: 256 ternary values, five to a byte, under a float16 scale."""

from nybble.models.gguf.types import WritableType
from nybble.models.gguf.types._fields import Raw, Trits

PART = WritableType(
    number=34,
    block=256,
    line="tq1_0",
    fields=(Trits("codes", ((32, 5), (16, 5), (4, 4))), Raw("d")),
)
