"""Verilog (2005) of a multiply-accumulate unit, generated from its two formats.

Each code becomes a sign, an unsigned factor and a shift. The factors are multiplied, the product is shifted to its
place in fixed point, and added to the sum or subtracted from it. A float is cut into its fields; subnormals need
nothing of their own: their leading bit is 0 and their shift that of the first normal binade. An integer's factor is its
magnitude; any other format's is looked up. Codes that are no number (NaN, Inf) add nothing and set ``invalid``, which
stays until ``reset``.

The ports: ``clock``; ``reset``, which clears the sum and wins over ``enable``; ``enable``, which adds ``w * x``.
"""

from __future__ import annotations

from nybble.formats.integer import IntFormat
from nybble.formats.minifloat import Minifloat
from nybble.hardware.mac import MacUnit
from nybble.hardware.operand import Operand


def verilog(unit: MacUnit) -> str:
    """The unit as the text of one module, called :attr:`~nybble.hardware.mac.MacUnit.name`."""
    sides = dict(zip("wx", unit.operands, strict=True))
    special = [name for name, operand in sides.items() if operand.special_codes]
    ports = [
        "input  wire clock, reset, enable",
        f"input  wire [{unit.weights.bits - 1}:0] w",
        f"input  wire [{unit.inputs.bits - 1}:0] x",
        f"output reg  signed [{unit.bits - 1}:0] sum",
        *(["output reg  invalid"] if special else []),
    ]
    lines = [
        f"// sum += w * x, exactly: {unit.weights.name} times {unit.inputs.name}.",
        f"// The sum counts steps of 2^{unit.lsb} and holds any dot product of up to {unit.length} terms.",
        f"module {unit.name} (",
        ",\n".join(f"  {port}" for port in ports),
        ");",
    ]
    for name, operand in sides.items():
        lines += ["", *_operand(name, operand)]
    lines += ["", *_product(unit, sides), "", *_register(unit, sides, special), "endmodule"]
    return "\n".join(lines) + "\n"


def _operand(name: str, operand: Operand) -> list[str]:
    """``NAME_factor``; ``NAME_negative``, ``NAME_shift`` and ``NAME_special`` where the format has such a thing."""
    fmt = operand.format
    if isinstance(fmt, Minifloat):
        lines = _float(name, fmt)
    elif isinstance(fmt, IntFormat):
        lines = _integer(name, operand)
    else:
        lines = _table(name, operand)
    if operand.special_codes:
        lines.append(f"  wire {name}_special = {_special(name, operand)};")
    return lines


def _float(name: str, fmt: Minifloat) -> list[str]:
    fields = f"{'sign, ' if fmt.has_sign else ''}{fmt.e} exponent bits, {fmt.m} mantissa bits"
    lines = [f"  // {name}: {fmt.name}: {fields}"]
    if fmt.has_sign:
        lines.append(f"  wire {name}_negative = {name}[{fmt.bits - 1}];")
    if fmt.e == 1:  # both exponents mean the same binade
        return [*lines, _wire(f"{name}_factor", fmt.m + 1, f"{name}[{fmt.m}:0]")]
    mantissa = f", {name}[{fmt.m - 1}:0]" if fmt.m else ""
    return [
        *lines,
        _wire(f"{name}_exponent", fmt.e, f"{name}[{fmt.e + fmt.m - 1}:{fmt.m}]"),
        f"  wire {name}_normal = {name}_exponent != 0;",
        _wire(f"{name}_factor", fmt.m + 1, f"{{{name}_normal{mantissa}}}"),
        _wire(f"{name}_shift", fmt.e, f"{name}_exponent - {name}_normal"),
    ]


def _integer(name: str, operand: Operand) -> list[str]:
    bits, width = operand.format.bits, operand.factor_bits
    if not operand.signed:
        return [f"  // {name}: {operand.format.name}", _wire(f"{name}_factor", width, name)]
    return [
        f"  // {name}: {operand.format.name}: two's complement, taken apart into sign and magnitude",
        f"  wire {name}_negative = {name}[{bits - 1}];",
        _wire(f"{name}_factor", width, f"({name} ^ {{{bits}{{{name}_negative}}}}) + {name}_negative"),
    ]


def _table(name: str, operand: Operand) -> list[str]:
    """The sign in front of the magnitude, by code."""
    bits, width = operand.format.bits, operand.factor_bits
    rows = [
        f"      {bits}'d{code}: {name}_read = {width + 1}'b{int(step < 0)}{abs(step):0{width}b};"
        for code, step in enumerate(operand.steps)
        if step
    ]
    return [
        f"  // {name}: {operand.format.name}: looked up, in steps of 2^{operand.lsb}",
        f"  reg [{width}:0] {name}_read;",
        "  always @*",
        f"    case ({name})",
        *rows,
        f"      default: {name}_read = 0;",
        "    endcase",
        *([f"  wire {name}_negative = {name}_read[{width}];"] if operand.signed else []),
        _wire(f"{name}_factor", width, f"{name}_read[{width - 1}:0]"),
    ]


def _special(name: str, operand: Operand) -> str:
    """An expression that is true of codes that are no number."""
    fmt = operand.format
    if isinstance(fmt, Minifloat) and fmt.specials == "ieee":
        return f"&{name}_exponent"
    if isinstance(fmt, Minifloat) and fmt.specials == "fn":
        return f"&{name}[{fmt.e + fmt.m - 1}:0]"
    return " | ".join(f"{name} == {fmt.bits}'d{code}" for code in operand.special_codes)


def _product(unit: MacUnit, sides: dict[str, Operand]) -> list[str]:
    """``product``, at its place in fixed point."""
    width = sum(operand.factor_bits for operand in sides.values())
    lines = [_wire("magnitude", width, "w_factor * x_factor")]
    shifted = {name: operand for name, operand in sides.items() if operand.most_shift}
    place = "magnitude"
    if shifted:
        # at least as wide as each exponent field, as codes that are no number shift further
        fields = [operand.format.e for operand in shifted.values() if isinstance(operand.format, Minifloat)]
        bits = max(*fields, 1, sum(operand.most_shift for operand in shifted.values()).bit_length())
        lines.append(_wire("shift", bits, " + ".join(f"{name}_shift" for name in shifted)))
        place = "magnitude << shift"
    return [*lines, _wire("product", unit.product_bits, place)]


def _register(unit: MacUnit, sides: dict[str, Operand], special: list[str]) -> list[str]:
    """The sum. Subtracting is adding the complement and one, so that one chain of carries does both."""
    negative = " ^ ".join(f"{name}_negative" for name, operand in sides.items() if _has_sign(operand))
    lines = [_wire("placed", unit.bits, "product")]
    added, when = "placed", "enable"
    if negative:
        lines.append(f"  wire negative = {negative};")
        added = f"(placed ^ {{{unit.bits}{{negative}}}}) + negative"
    if special:
        lines.append(f"  wire special = {' | '.join(f'{name}_special' for name in special)};")
        when = "enable && !special"
    lines += ["  always @(posedge clock)", "    if (reset) sum <= 0;", f"    else if ({when}) sum <= sum + {added};"]
    if special:
        lines += [
            "  always @(posedge clock)",
            "    if (reset) invalid <= 0;",
            "    else if (enable && special) invalid <= 1;",
        ]
    return lines


def _has_sign(operand: Operand) -> bool:
    return operand.format.has_sign if isinstance(operand.format, Minifloat) else operand.signed


def _wire(name: str, width: int, value: str) -> str:
    return f"  wire [{width - 1}:0] {name} = {value};"
