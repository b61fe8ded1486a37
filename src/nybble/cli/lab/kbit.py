"""``nybble lab kbit DATA``: bit-level scaling curves, and which width is best at equal total bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli._output import note, print_json, print_table
from nybble.cli.lab._places import STORE, Json, Place, Where

if TYPE_CHECKING:
    from nybble.lab.laws.bit_level import Best, Shapes

SHOWN = 9
"""Budgets that the table shows; ``--json`` has all."""


def command(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A sweep, or a .csv or .parquet file of runs.")],
    by: Annotated[str, typer.Option(help="Columns, commas between: a curve for each combination.")] = "bits",
    family: Annotated[str, typer.Option(help="The column that says which models are of one kind, in sizes.")] = "",
    size: Annotated[str, typer.Option(help="The column of parameters.")] = "parameters",
    total: Annotated[
        str,
        typer.Option(help="The column of bits of a model, or bytes (a name that ends so); left out: of all tensors."),
    ] = "",
    y: Annotated[str, typer.Option(help="The column that is judged.")] = "nll",
    error: Annotated[str, typer.Option(help="The column of its standard errors, if there is one.")] = "",
    paired: Annotated[str, typer.Option(help="A column whose values repeats of all models share: judged_on.")] = "",
    high: Annotated[bool, typer.Option("--high", help="The largest is best, as of accuracies.")] = False,
    draws: Annotated[int, typer.Option(help="Of the bootstrap over repeats and errors.")] = 500,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves: .png, .svg or .pdf.")] = None,
    where: Where = None,
    store: Place = STORE,
    json: Json = False,
) -> None:
    """Compare few bits of a larger model with more bits of a smaller one, at equal total bits."""
    from nybble.core.errors import DataError
    from nybble.core.options import at_least_one
    from nybble.lab.laws.bit_level import Names, best_series, families, shapes
    from nybble.lab.laws.source import read_rows

    at_least_one(draws=draws)
    series = tuple(name.strip() for name in by.split(",") if name.strip())
    names = Names(size=size, total=total, y=y, by=series, family=family, error=error, paired=paired)
    found = families(read_rows(data, store, where or ()), names)
    best = [best_series(cells, name, high=high, draws=draws, paired=bool(paired)) for name, cells in found.items()]
    fits: dict[str, Shapes] = {}
    for name, cells in found.items():
        try:
            fits[name] = shapes(cells)
        except DataError as why:
            note(f"family {name or 'of all models'}: {why}")
    if plot is not None:
        from nybble.lab.laws.pictures import draw_bit_level

        draw_bit_level(found, plot, y=y)
    if json:
        print_json({"families": [_described(each, fits.get(each.family)) for each in best]})
        return
    for each in best:
        _print(each, fits.get(each.family), ", ".join(series))


def _described(best: Best, fitted: Shapes | None) -> dict[str, Any]:
    import dataclasses

    return {
        **dataclasses.asdict(best), "shapes": None if fitted is None else dataclasses.asdict(fitted),
        "budgets": [{"bits": bits, "best": series, "sure": sure} for bits, series, sure in best.budgets],
    }  # fmt: skip


def _print(best: Best, fitted: Shapes | None, by: str) -> None:
    rows = [
        [name, f"{excess:.4f}", f"{100 * best.sure[name]:.0f} %" if best.repeated else "no repeats"]
        for name, excess in sorted(best.excess.items(), key=lambda found: found[1])
    ]
    print_table(best.family or "all models", (by, "mean excess at equal bits", "best in so many draws"), rows)
    step = max(1, len(best.budgets) // SHOWN)
    budgets = [
        [f"{bits:.4g}", series, f"{100 * sure:.0f} %" if best.repeated else "no repeats"]
        for bits, series, sure in best.budgets[::step]
    ]
    print_table("", ("total bits", f"best {by}", "in so many draws"), budgets)
    if fitted is not None:
        offsets = ", ".join(f"{name} {100 * value:+.2f} %" for name, value in fitted.offsets.items())
        print(f"parallel curves: R² {fitted.parallel:.4f} (offsets {offsets}); a power law: R² {fitted.power:.4f}")
