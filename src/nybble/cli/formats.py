"""``nybble formats [NAME]``: the number formats, or every value of one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli._output import print_json, print_table
from nybble.core.errors import UsageError

if TYPE_CHECKING:
    from nybble.formats import NumberFormat


def command(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A format or a preset, such as e2m1, nf4, mxfp4.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the values to this image file (PNG, SVG, PDF).")
    ] = None,
) -> None:
    """List number formats and presets, or show every value of one."""
    if name is None:
        if plot is not None:
            raise UsageError("--plot draws one format; name it: nybble formats e2m1 --plot e2m1.png")
        _list(json)
        return
    fmt, line = _find(name)
    if plot is not None:
        from nybble.cli._plot import plot_format

        plot_format(fmt, plot)
    if json:
        print_json(_facts(fmt) | ({"preset": line} if line else {}))
    else:
        _show(fmt, line)


def _find(name: str) -> tuple[NumberFormat, str]:
    """The format of a name, a preset or any quantizer line; the preset's own line."""
    from nybble.presets import PRESETS
    from nybble.quantizer import Quantizer

    return Quantizer(name).format, PRESETS.get(name, "")


def _facts(fmt: NumberFormat) -> dict[str, Any]:
    return {
        "name": fmt.name,
        "bits": fmt.bits,
        "values": [float(v) for v in fmt.values],
        "distinct": len(fmt.grid),
        "max": fmt.max,
        "min": fmt.min,
        "min_normal": fmt.min_normal,
        "smallest": fmt.smallest,
        "signed": fmt.signed,
        "aliases": list(fmt.aliases),
        "unused": _unused(fmt),
    }


def _unused(fmt: NumberFormat) -> list[int]:
    """Codes of numbers that nothing is rounded to: INT4's -8, unless ``symmetric=false``."""
    codes = [int(code) for code in (~fmt.encodable()).nonzero()[0]]
    return [code for code in codes if math.isfinite(fmt.values[code])]


def _list(json: bool) -> None:
    from nybble.formats import format_names, get_format
    from nybble.presets import PRESETS

    formats = [get_format(n) for n in format_names()]
    if json:
        print_json(
            {
                "formats": [{"name": f.name, "bits": f.bits, "max": f.max, "distinct": len(f.grid)} for f in formats],
                "presets": PRESETS,
            }
        )
        return
    rows = [[f.name, str(f.bits), str(len(f.grid)), f"{f.min:g}", f"{f.max:g}", f"{f.smallest:.3g}"] for f in formats]
    print_table("number formats", ("name", "bits", "values", "min", "max", "smallest > 0"), rows)
    print_table("presets", ("name", "quantizer"), [[key, line] for key, line in PRESETS.items()])


def _show(fmt: NumberFormat, line: str) -> None:
    if line:
        print(f"preset: {line}")
    print(
        f"{fmt.name}: {fmt.bits} bits, {len(fmt.grid)} values from {fmt.min:g} to {fmt.max:g}, "
        f"smallest above zero {fmt.smallest:g}"
    )
    width = (fmt.bits + 3) // 4
    unused = _unused(fmt)
    marks = dict.fromkeys(unused, "*")
    shown = [f"0x{code:0{width}X} {value:g}{marks.get(code, '')}" for code, value in enumerate(fmt.values)]
    if fmt.aliases:
        print(f"also called {', '.join(fmt.aliases)}")
    if len(shown) > 256:
        print(f"{len(shown)} codes; --json lists them all")
        return
    for start in range(0, len(shown), 8):
        print("  ".join(f"{text:<16}" for text in shown[start : start + 8]).rstrip())
    if unused:
        more = (
            f": {fmt.name}_full, as symmetric=false makes of it, uses all codes" if fmt.name == f"int{fmt.bits}" else ""
        )
        print(f"* a code that nothing is rounded to{more}")
