"""Q4_K: 8 blocks of 32 four-bit codes; scales and minima of six bits over float16 ones."""

from nybble.models.gguf.types import WritableType
from nybble.models.gguf.types._fields import Pairs, Raw, SixBits

PART = WritableType(
    number=12,
    block=256,
    line="q4_k",
    fields=(Raw("d"), Raw("m"), SixBits(), Pairs("codes", 128, run=32)),
    negative=True,
)
