"""Every operation once: schema, fake and a reference one can read.

``kernels/`` adds fast versions by name, changing no number (:mod:`nybble.ops.loader`).
"""

from nybble.ops import blocks, measured, rounding, straight, tables
from nybble.ops.loader import load_at_first_use

_OPS = {
    id(op): op
    for part in (blocks, measured, rounding, straight, tables)
    for op in vars(part).values()
    if hasattr(op, "register_kernel")
}
load_at_first_use(_OPS.values())
