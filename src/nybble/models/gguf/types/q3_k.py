"""Q3_K: 16 blocks of 16 three-bit integers; six-bit scales over a float16 one."""

from nybble.models.gguf.types import WritableType
from nybble.models.gguf.types._fields import Plane, Raw

PART = WritableType(
    number=11,
    block=256,
    line="q3_k",
    fields=(
        Plane("codes", 32, bits=1, run=32, shift=2),
        Plane("codes", 64, bits=2, run=32),
        Plane("scale", 8, bits=4, run=8),
        Plane("scale", 4, bits=2, run=4, shift=4),
        Raw("d"),
    ),
    flips={"codes": 4, "scale": 32},
)
