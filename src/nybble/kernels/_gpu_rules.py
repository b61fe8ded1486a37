# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The update rules of :mod:`nybble.optim` inside a Triton kernel, in the order of operations that torch has.

torch's own operators contract a product and a sum into one rounding here and there, otherwise on a GPU than on a CPU;
``FORMS`` (:mod:`nybble.optim._forms`) says where, so that the bits are those of the rule on the same device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nybble.kernels._gpu_exact import fused, quotients, roots

ADAMW, ADAM, SGD, LION, RMSPROP, ADAGRAD = (tl.constexpr(rule) for rule in range(6))
"""As :data:`nybble.kernels._steps.RULES` has them."""
LERP, ADDCMUL, SQUARE, ADDCDIV, ADD, DIV = (tl.constexpr(form) for form in range(6))
"""As :class:`nybble.optim._forms.Forms` has them."""


@triton.jit
def _sum(a, b, c, FUSED: tl.constexpr):
    """``a b + c``."""
    if FUSED:
        return fused(a, b, c)
    else:
        return a * b + c


@triton.jit
def _plus(number, b, c, FUSED: tl.constexpr):
    """``number b + c``."""
    return _sum(tl.full(c.shape, number, tl.float32), b, c, FUSED)


@triton.jit
def _add_squares(x, g, by, HOW: tl.constexpr):
    """``x.addcmul(g, g, value=by)``."""
    if HOW < 2:
        return _sum(g * by, g, x, HOW == 1)
    else:
        return _plus(by, g * g, x, HOW == 3)


@triton.jit
def _add_quotients(x, a, b, by, HOW: tl.constexpr):
    """``x.addcdiv(a, b, value=by)``."""
    if HOW == 0:
        return quotients(a * by, b) + x
    else:
        return _plus(by, quotients(a, b), x, HOW == 2)


@triton.jit
def _sign(x):
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)


@triton.jit
def second(g, two, b2, a2, start, RULE: tl.constexpr, FORMS: tl.constexpr, FIRST: tl.constexpr):
    """The new mean (or sum) of squares, of a gradient with its decay."""
    if RULE == ADAGRAD:
        if FIRST:
            two = two + start
        return _sum(g, g, two, FORMS[SQUARE])
    else:
        return _add_squares(two * b2, g, a2, FORMS[ADDCMUL])


@triton.jit
def decayed(p, g, wd, RULE: tl.constexpr, FORMS: tl.constexpr, DECAY: tl.constexpr):
    """The gradient of a rule whose decay goes through it."""
    if DECAY and RULE != ADAMW and RULE != LION:
        return _plus(wd, p, g, FORMS[ADD])
    else:
        return g


@triton.jit
def updated(
    p, g, one, two, rate, shrink, wd, b1, a1, b2, a2, root, inverse, eps, start,
    RULE: tl.constexpr, FORMS: tl.constexpr, DECAY: tl.constexpr, FIRST: tl.constexpr, NESTEROV: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """New parameter and states, float32; HELD: whether there is a first state."""
    g = decayed(p, g, wd, RULE, FORMS, DECAY)
    if DECAY and (RULE == ADAMW or RULE == LION):  # noqa: SIM109 - Triton compiles no "in"
        p = p * shrink
    if RULE == ADAMW or RULE == ADAM:  # noqa: SIM109
        one = _plus(a1, g - one, one, FORMS[LERP])
        two = second(g, two, b2, a2, start, RULE, FORMS, FIRST)
        below = roots(two)
        if FORMS[DIV]:
            below = below * inverse
        else:
            below = quotients(below, tl.full(below.shape, root, tl.float32))
        p = _add_quotients(p, one, below + eps, rate, FORMS[ADDCDIV])
    elif RULE == SGD:
        if FIRST or not HELD:
            one = g
        else:
            one = _plus(a1, g, one * b1, FORMS[ADD])
        towards = one
        if NESTEROV:
            towards = _plus(b1, one, g, FORMS[ADD])
        p = _plus(rate, towards, p, FORMS[ADD])
    elif RULE == LION:
        towards = _sign(_plus(a1, g, one * b1, FORMS[ADD]))
        one = _plus(a2, g, one * b2, FORMS[ADD])
        p = _plus(rate, towards, p, FORMS[ADD])
    else:
        two = second(g, two, b2, a2, start, RULE, FORMS, FIRST)
        below = roots(two) + eps
        if RULE == RMSPROP and HELD:
            one = quotients(g, below) + one * b1
            p = _plus(rate, one, p, FORMS[ADD])
        else:
            p = _add_quotients(p, g, below, rate, FORMS[ADDCDIV])
    return p, one, two
