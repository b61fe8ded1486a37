"""Products of activations and weights that are both rounded, at least one to floats, as one operator.

``kernels/`` has versions for tensor cores: E2M1 and E4M3 on FP8 units, blocks of E2M1 (MXFP4, NVFP4) in bfloat16, where
they are exact. What is whole numbers on both sides is :mod:`nybble.nn.integer_products`'s.
"""

from __future__ import annotations

from functools import lru_cache

from nybble.nn.compiled import quantizer_of
from nybble.nn.integer_products import TAKES, checker, reference
from nybble.nn.products import Operator, like_product
from nybble.ops.loader import load_at_first_use
from nybble.qtensor import Spec
from nybble.quantizer import Quantizer

DEVICES = frozenset({"cuda"})
"""Types of devices for which there are kernels."""
_FORMATS = ("float4_e2m1fn", "float8_e4m3fn")


def rounds_to_floats(quantizer: Quantizer) -> bool:
    """Whether activations become what tensor cores read: few bits with a scale a row, or blocks exact in bfloat16."""
    told = quantizer.reciprocal or quantizer.raw_scale or quantizer.floor or quantizer.center
    name, _, size = str(quantizer.granularity).partition("=")
    placed = name in ("token", "tensor") or (name == "group" and size.isdecimal())
    known = quantizer.format.name in _FORMATS or (quantizer.format.is_integer and quantizer.format.bits <= 8)
    return known and placed and quantizer.rounding == "nearest-even" and not (told or quantizer.scale.has_offset)


def holds_floats(spec: Spec) -> bool:
    """Whether a QTensor's values are in few bits that tensor cores read, times scales."""
    plain = spec["kind"] == "block" and spec.get("layout", "dense") == "dense" and "grid" not in spec
    return plain and (spec["format"] in _FORMATS or _small_integers(str(spec["format"])))


@lru_cache(maxsize=256)
def _small_integers(name: str) -> bool:
    quantizer = quantizer_of(name)
    return quantizer.format.is_integer and quantizer.format.bits in (4, 8)


_check = checker(rounds_to_floats, "numbers that tensor cores read")
float_linear = Operator("float_linear", reference, TAKES, like_product, _check)
"""``x`` rounded and times W; arguments and result as :func:`nybble.nn.integer_products.reference` has them."""
load_at_first_use([float_linear])
