# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Quotients and square roots inside a Triton kernel, rounded as IEEE says, of which few instructions are left.

The compiler's own test the range of every operand and branch behind each, so that no two of them are under way at once.
Here several elements share one test and one branch, and a division by a number that many share has none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nybble.kernels._gpu import INTERPRETED
from nybble.kernels._gpu_blocks import divided

HOST: tl.constexpr = tl.constexpr(INTERPRETED)
TOGETHER = 4
"""Elements that share a test."""

_FAST_ROOT = """
max.f32 t, a, 0f0D000000;
rsqrt.approx.ftz.f32 y, t;
mul.ftz.f32 q{i}, a, y;
mul.ftz.f32 y, y, 0f3F000000;
neg.f32 t, q{i};
fma.rn.f32 t, t, q{i}, a;
fma.rn.f32 q{i}, t, y, q{i};
"""
"""The compiler's own, which is right for 0 (by the bound) and from 2^-101 on."""
_FAST_QUOTIENT = """
rcp.approx.ftz.f32 y, b;
neg.f32 t, b;
fma.rn.f32 e, t, y, 0f3F800000;
fma.rn.f32 y, y, e, y;
mul.rn.f32 q{i}, a, y;
fma.rn.f32 e, t, q{i}, a;
fma.rn.f32 q{i}, y, e, q{i};
copysign.f32 q{i}, a, q{i};
"""
"""The compiler's own, which is right where nothing comes near to the ends of float32; 0 would lose its sign."""
_LEAST = {"root": 0x0D000000, "quotient": 0x0D800000}
_MOST = {"root": 0x7F800000, "quotient": 0x4B800000}
"""Bits of operands: of roots 2^-101 to infinity, of quotients 2^-100 to 2^24."""


def _assembly(name: str) -> str:
    """PTX for TOGETHER elements: all of them fast, then a test of all, then the slow way for them all."""
    n = TOGETHER
    divides = name == "quotient"
    lines = [".reg .f32 a, b, e, t, y, " + ", ".join(f"q{i}" for i in range(n)) + ";"]
    lines += [".reg .b32 u, least, most;", ".reg .pred fine;", "mov.b32 least, -1;", "mov.b32 most, 0;"]
    for i in range(n):
        lines.append(f"mov.b32 a, ${n + i};")
        if divides:
            lines += [
                f"mov.b32 b, ${2 * n + i};",
                "mov.b32 u, b;",
                "max.u32 most, most, u;",
                "min.u32 least, least, u;",
            ]
        lines += ["mov.b32 u, a;", *(["and.b32 u, u, 0x7FFFFFFF;"] if divides else []), "max.u32 most, most, u;"]
        lines += ["sub.u32 u, u, 1;", "min.u32 least, least, u;"]  # 0 becomes the largest: it is no small number
        lines.append((_FAST_QUOTIENT if divides else _FAST_ROOT).format(i=i))
    lines += [f"setp.ge.u32 fine, least, {_LEAST[name]};", f"setp.lt.and.u32 fine, most, {_MOST[name]}, fine;"]
    lines.append("@fine bra DONE;")
    operands = [(f"${n + i}", f"${2 * n + i}") for i in range(n)]
    slow = "div.rn.f32 q{i}, {a}, {b};" if divides else "sqrt.rn.f32 q{i}, {a};"
    lines += [slow.format(i=i, a=a, b=b) for i, (a, b) in enumerate(operands)]
    lines += ["DONE:", *(f"mov.b32 ${i}, q{i};" for i in range(n))]
    return "{\n" + "\n".join(lines) + "\n}"


def _constraints(operands: int) -> str:
    return ",".join(["=f"] * TOGETHER + ["f"] * (TOGETHER * operands))


ROOTS: tl.constexpr = tl.constexpr(_assembly("root"))
QUOTIENTS: tl.constexpr = tl.constexpr(_assembly("quotient"))
OF_ONE: tl.constexpr = tl.constexpr(_constraints(1))
OF_TWO: tl.constexpr = tl.constexpr(_constraints(2))
PACK: tl.constexpr = tl.constexpr(TOGETHER)


@triton.jit
def fused(a, b, c):
    """``a b + c``, rounded once; the interpreter's own is rounded twice."""
    if HOST:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def roots(x):
    """Square roots, of float32 from 0 on."""
    if HOST:
        return tl.math.sqrt_rn(x)
    else:
        return tl.inline_asm_elementwise(ROOTS, OF_ONE, [x], tl.float32, True, PACK)


@triton.jit
def quotients(x, by):
    """``x / by``, element by element, float32."""
    if HOST:
        return divided(x, by)
    else:
        return tl.inline_asm_elementwise(QUOTIENTS, OF_TWO, [x, by], tl.float32, True, PACK)


@triton.jit
def floors(x, above: tl.constexpr):
    """int32: ``x + above`` rounded down, from 0 up to 2^22."""
    if HOST:
        return tl.floor(x.to(tl.float64) + above).to(tl.int32)
    else:
        from_above = tl.full(x.shape, 8388608.0 + above, tl.float32)
        sums = tl.inline_asm_elementwise("add.rm.f32 $0, $1, $2;", "=f,f,f", [x, from_above], tl.float32, True, 1)
        return sums.to(tl.int32, bitcast=True) & 0x3FFFFF


@triton.jit
def spread(x, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """[TILE / BLOCK], one number for each block, as [TILE]."""
    return tl.reshape(tl.broadcast_to(x[:, None], (TILE // BLOCK, BLOCK)), (TILE,))


@triton.jit
def over_blocks(x, by, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """float32 [TILE]: ``x`` over one number a block, from 2^-80 to 2^100, above which no magnitude is by much.

    One correction of a quotient by a reciprocal that is rounded correctly is rounded correctly (Markstein, IBM J. Res.
    Dev. 34(1), 1990, section 4), as long as the remainder is exact; of quotients below 2^-30 it may not be.
    """
    inverse = spread(divided(tl.full(by.shape, 1.0, tl.float32), by), BLOCK, TILE)
    by, near = spread(by, BLOCK, TILE), x * inverse
    return fused(fused(-by, near, x), inverse, near)
