"""AF4: the 4-bit code book that minimises the expected absolute error of absmax-scaled normal blocks of 64.

Yoshida 2023, "NF4 Isn't Information Theoretically Optimal", arXiv:2306.06965; values as shipped by bitsandbytes.
"""

from nybble.formats._base import TableFormat

PART = TableFormat(
    "af4",
    4,
    table=(
        *(-1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0),
        *(0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0),
    ),
)
