"""Q6_K: 16 blocks of 16 six-bit integers; eight-bit scales over a float16 one."""

from nybble.models.gguf.types import WritableType
from nybble.models.gguf.types._fields import Plane, Raw

PART = WritableType(
    number=14,
    block=256,
    line="q6_k",
    fields=(
        Plane("codes", 128, bits=4, run=64),
        Plane("codes", 64, bits=2, run=32, shift=4),
        Raw("scale", 16),
        Raw("d"),
    ),
    flips={"codes": 32},
)
