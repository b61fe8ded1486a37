"""Ternary without a sign: 0, 1, 2 in two bits (code 3 unused), for what is never negative.

The non-negative set {0, a, 2a} of softmax outputs and of what enters the second linear layer of a feed-forward block:
Liu et al. 2023, "Binary and Ternary Natural Language Generation", arXiv:2306.01841.
"""

from nybble.formats._base import TableFormat

PART = TableFormat("uternary", 2, table=(0.0, 1.0, 2.0))
