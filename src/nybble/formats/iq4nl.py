"""IQ4_NL's sixteen integers, denser near 0 and not symmetric; the scale may be negative.

``kvalues_iq4nl`` of github.com/ggml-org/ggml, ``ggml-common.h``.
"""

from nybble.formats._base import TableFormat

PART = TableFormat("iq4nl", 4, table=(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
