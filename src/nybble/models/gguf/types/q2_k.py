"""Q2_K: 16 blocks of 16 two-bit codes; scales and minima of four bits over float16 ones."""

from nybble.models.gguf.types import WritableType
from nybble.models.gguf.types._fields import LowHigh, Plane, Raw

PART = WritableType(
    number=10,
    block=256,
    line="q2_k",
    fields=(LowHigh("scale", "offset", 16), Plane("codes", 64, bits=2, run=32), Raw("d"), Raw("m")),
    negative=True,
)
