"""IQ4_XS: 8 blocks of 32 codes of IQ4_NL's table; six-bit scales over a float16 one."""

from nybble.models.gguf.types import WritableType
from nybble.models.gguf.types._fields import Pairs, Plane, Raw

PART = WritableType(
    number=23,
    block=256,
    line="iq4_xs",
    fields=(
        Raw("d"),
        Plane("scale", 2, bits=2, run=1, shift=4),
        Plane("scale", 4, bits=4, run=1),
        Pairs("codes", 128, run=16),
    ),
    flips={"scale": 32},
)
