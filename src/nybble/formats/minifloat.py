"""Floating point of 2 to 16 bits: any ExMy, with IEEE, fn, fnuz or all-finite top codes.

Names follow ml_dtypes: ``float8_e4m3fn``, ``float8_e5m2``, ``float8_e4m3fnuz``, ``float8_e4m3b11fnuz``,
``float4_e2m1fn``.

==============  =====================================================================================
suffix          what the top codes mean
==============  =====================================================================================
(none)          IEEE: the top exponent holds Inf and NaN
``fn``          one NaN (all ones) a sign, no Inf; the OCP formats of 4 and 6 bits keep no NaN at all
``fnuz``        one NaN (the code of minus zero), no Inf, a single zero, bias one higher
``_finite``     every code is a number (FPGA minifloats, LLM-FP4)
==============  =====================================================================================

``b11`` before the suffix sets the bias; ``ufloat...`` drops the sign. Short names: ``e2m1``, ``e4m3``, ``e5m2``,
``e3m2`` and ``e2m3`` are the OCP formats, any other ``eXmY`` is all-finite. Saturates; subnormals are kept.
``bfloat16`` is E8M7 and ``float16`` E5M10; ``fp8`` and ``fp4`` alone mean E4M3 and E2M1, as in most papers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from nybble.core.errors import FormatError
from nybble.formats._base import Family, NumberFormat

_OCP_NO_NAN = {(2, 1), (2, 3), (3, 2)}
_SHORT = {(2, 1): "fn", (2, 3): "fn", (3, 2): "fn", (4, 3): "fn", (5, 2): "", (8, 7): "", (5, 10): ""}


@dataclass(frozen=True)
class Minifloat(NumberFormat):
    """Sign, ``e`` exponent bits, ``m`` mantissa bits.

    value = (-1)^s * 2^(p - bias) * (1 + f / 2^m), and for exponent field p = 0: (-1)^s * 2^(1 - bias) * f / 2^m.

    Attributes:
        specials: ``ieee``, ``fn``, ``fnuz`` or ``finite`` (module docstring).
    """

    e: int = 0
    m: int = 0
    bias: int = 0
    specials: str = "finite"
    has_sign: bool = True

    def __post_init__(self) -> None:
        if self.e < 1:
            raise FormatError(
                f"{self.name}: a floating-point format needs at least one exponent bit; e=0 is an integer grid "
                f"(int{self.bits})."
            )
        if not 2 <= self.bits <= 16:
            raise FormatError(f"{self.name}: {self.bits} bits; minifloats have 2 to 16.")
        if self.bits != self.has_sign + self.e + self.m:
            raise FormatError(
                f"{self.name}: {'1 sign + ' if self.has_sign else ''}{self.e} exponent + {self.m} mantissa bits make "
                f"{self.has_sign + self.e + self.m}, not {self.bits}."
            )
        if self.specials == "ieee" and self.e < 2:
            raise FormatError(
                f"{self.name}: IEEE specials take the whole top exponent; e=1 has none to spare. Use '_finite'."
            )
        if self.emin - self.m < -149 or self.emax > 127:
            raise FormatError(f"{self.name}: bias {self.bias} leaves the range of float32, in which nybble calculates.")

    @property
    def exponent_bits(self) -> int:  # noqa: D102
        return self.e

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal binade."""
        return 1 - self.bias

    @property
    def emax(self) -> int:
        """Exponent of the largest binade that holds finite values."""
        return (1 << self.e) - 1 - self.bias - (self.specials == "ieee" or (self.specials == "fn" and self.m == 0))

    @property
    def min_normal(self) -> float:  # noqa: D102
        return 2.0**self.emin

    def decode_table(self) -> np.ndarray:  # noqa: D102
        codes = np.arange(2**self.bits)
        magnitude_bits = self.e + self.m
        sign = np.where(codes >> magnitude_bits & 1, -1.0, 1.0)
        p, f = codes >> self.m & (2**self.e - 1), codes & (2**self.m - 1)
        value = (
            np.where(p > 0, np.ldexp(1.0 + f / 2**self.m, p - self.bias), np.ldexp(f / 2**self.m, 1 - self.bias)) * sign
        )
        ones = (codes & (2**magnitude_bits - 1)) == 2**magnitude_bits - 1
        if self.specials == "ieee":
            value = np.where(p == 2**self.e - 1, np.where(f == 0, sign * np.inf, np.nan), value)
        elif self.specials == "fn":
            value = np.where(ones, np.nan, value)
        elif self.specials == "fnuz":
            value = np.where((value == 0) & np.signbit(value), np.nan, value)
        return np.asarray(value)


def make_minifloat(
    e: int, m: int, *, specials: str = "finite", bias: int | None = None, signed: bool = True
) -> Minifloat:
    """The format with ``e`` exponent and ``m`` mantissa bits, under its canonical name."""
    bits = int(signed) + e + m
    usual = 2 ** (e - 1) - 1 + (specials == "fnuz") if e >= 1 else 0
    if (e, m) in _OCP_NO_NAN and signed and specials in ("fn", "finite") and bias in (None, usual):
        return Minifloat(f"float{bits}_e{e}m{m}fn", bits, e=e, m=m, bias=usual)
    suffix = {"ieee": "", "finite": "_finite"}.get(specials, specials)
    b = "" if bias in (None, usual) else f"b{bias}"
    name = f"{'' if signed else 'u'}float{bits}_e{e}m{m}{b}{suffix}"
    return Minifloat(name, bits, e=e, m=m, bias=usual if bias is None else bias, specials=specials, has_sign=signed)


def _build(match: re.Match[str]) -> Minifloat:
    unsigned, bits, e_text, m_text, bias, suffix = match.groups()
    e, m = int(e_text), int(m_text)
    if bits is None and not suffix and not unsigned:
        suffix = _SHORT.get((e, m), "_finite")
    elif bits is None and not suffix:
        suffix = "_finite"
    specials = {"": "ieee", "_finite": "finite"}.get(suffix, suffix)
    made = make_minifloat(e, m, specials=specials, bias=None if bias is None else int(bias), signed=not unsigned)
    if bits is not None and int(bits) != made.bits:
        raise FormatError(
            f"{match[0]}: 1 sign + {e} + {m} bits make {made.bits}, not {bits}. Did you mean '{made.name}'?"
        )
    return made


PART = Family(
    pattern=r"(u)?(?:float(\d+)_)?e(\d+)m(\d+)(?:b(-?\d+))?(fnuz|fn|_finite|)",
    build=_build,
    listed=(
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3", "float8_e3m4"),
        *("float8_e4m3b11fnuz", "float6_e3m2fn", "float6_e2m3fn", "float4_e2m1fn", "float16_e5m10", "float16_e8m7"),
        *(
            make_minifloat(e, k - 1 - e).name
            for k in range(3, 9)
            for e in range(1, min(k, 6))
            if (e, k - 1 - e) not in _OCP_NO_NAN
        ),
        *("ufloat4_e2m2_finite", "ufloat8_e4m4_finite"),
    ),
    aliases={
        "bfloat16": "float16_e8m7",
        "bf16": "float16_e8m7",
        "float16": "float16_e5m10",
        "fp16": "float16_e5m10",
        "half": "float16_e5m10",
        "fp8": "float8_e4m3fn",
        "float8": "float8_e4m3fn",
        "fp8_e4m3": "float8_e4m3fn",
        "fp8_e5m2": "float8_e5m2",
        "fp6_e3m2": "float6_e3m2fn",
        "fp6_e2m3": "float6_e2m3fn",
        "fp4": "float4_e2m1fn",
        "float4": "float4_e2m1fn",
        "fp4_e2m1": "float4_e2m1fn",
    },
)
