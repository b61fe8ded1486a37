"""``nybble mac WEIGHTS [INPUTS]``: what a multiply-accumulate unit of two formats costs, and its Verilog."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli._output import print_json, print_table

if TYPE_CHECKING:
    from nybble.hardware.mac import MacUnit


def command(
    weights: Annotated[str, typer.Argument(metavar="WEIGHTS", help="A format, such as e2m1, int4, e4m3.")],
    inputs: Annotated[str | None, typer.Argument(metavar="INPUTS", help="Of the inputs; the weights' if none.")] = None,
    length: Annotated[int, typer.Option("--length", help="Terms of the longest dot product.")] = 4608,
    accumulator: Annotated[
        str, typer.Option("--accumulator", help="exact: as wide as it has to be; stated: arXiv:2311.12359's formula.")
    ] = "exact",
    verilog: Annotated[Path | None, typer.Option("--verilog", help="Write the unit to this file.")] = None,
    synthesize: Annotated[bool, typer.Option("--synthesize", help="Map it to LUTs with Yosys.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Cost of a multiply-accumulate unit with an exact sum: widths, LUTs, Verilog."""
    from nybble.core.files import atomic_write_text
    from nybble.hardware import verilog as text

    unit = _unit(weights, inputs or weights, length, accumulator)
    if verilog is not None:
        atomic_write_text(verilog, text.verilog(unit))
    facts = _facts(unit)
    if synthesize:
        from nybble.hardware.tools import synthesize as mapped_by_yosys

        mapped = mapped_by_yosys(unit)
        facts |= {"luts": mapped.luts, "carries": mapped.carries, "flops": mapped.flops}
    if json:
        print_json(facts)
    else:
        shown = [[key.replace("_", " "), "-" if value is None else f"{value}"] for key, value in facts.items()]
        print_table("", ("", unit.name), shown)


def _unit(weights: str, inputs: str, length: int, accumulator: str) -> MacUnit:
    from nybble.formats import get_format
    from nybble.hardware.mac import MacUnit

    made: Any = MacUnit
    found: MacUnit = made(
        weights=get_format(weights), inputs=get_format(inputs), length=length, accumulator=accumulator
    )
    return found


def _facts(unit: MacUnit) -> dict[str, Any]:
    from nybble.core.errors import UsageError
    from nybble.costs.mac import luts

    try:
        stated: int | None = unit.stated_bits
    except UsageError:  # of tables the paper says nothing
        stated = None
    return {
        "weights": unit.weights.name,
        "inputs": unit.inputs.name,
        "length": unit.length,
        "product_bits": unit.product_bits,
        "accumulator_bits": unit.bits,
        "exact_bits": unit.exact_bits,
        "stated_bits": stated,
        "step": 2.0**unit.lsb,
        "luts_estimated": round(luts(unit), 1),
    }
