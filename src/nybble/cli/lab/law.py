"""``nybble lab law``: the loss of training in a floating-point format, by the published law or one's own runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli._output import note, print_json, print_table
from nybble.cli.lab._places import STORE, Json, Place, Where

if TYPE_CHECKING:
    from nybble.lab.laws.fit import Fit
    from nybble.lab.rows import Table


def command(
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="[DATA]",
            help="Trainings to fit: a .csv or .parquet file, or a sweep (N, D, format, B, loss, twin). "
            "Left out: the published law.",
        ),
    ] = None,
    parameters: Annotated[float | None, typer.Option(help="N: weights of the linear layers.")] = None,
    tokens: Annotated[float | None, typer.Option(help="D: training tokens.")] = None,
    format: Annotated[str | None, typer.Option(help="Of weights: E4M3, E2M1 ...; left out: bfloat16.")] = None,
    block: Annotated[str, typer.Option(help="Elements that share a scale, or channel.")] = "128",
    bits: Annotated[int | None, typer.Option(help="Compare exponents with mantissas at this width.")] = None,
    compute: Annotated[float | None, typer.Option(help="FLOPs: the best width, and N and D, for them.")] = None,
    loss: Annotated[str | None, typer.Option(help="The column of losses, where it isn't 'loss'.")] = None,
    pair: Annotated[
        str,
        typer.Option(help="Columns, commas between, in which a training's twin in bf16 agrees beside N and D: seed."),
    ] = "",
    draws: Annotated[int, typer.Option(help="Of the bootstrap, for intervals.")] = 200,
    plot: Annotated[Path | None, typer.Option(help="Draw measured against fitted losses: .png, .svg or .pdf.")] = None,
    where: Where = None,
    store: Place = STORE,
    json: Json = False,
) -> None:
    """Predict what a format costs in training; fit the law to trainings of one's own, beside two simpler laws."""
    from nybble.core.errors import UsageError
    from nybble.core.options import at_least_one
    from nybble.lab.laws.forecast import Plan, forecast, warnings_of
    from nybble.lab.laws.training import PUBLISHED
    from nybble.lab.laws.trainings import block_of, layout_of

    at_least_one(draws=draws)
    plan = Plan(
        N=parameters, D=tokens, block=block_of(block), bits=bits, compute=compute,
        layout=None if format is None else layout_of(format),
    )  # fmt: skip
    if plot is not None and data is None:
        raise UsageError("--plot shows trainings beside a fit: give DATA.")
    if data is None and (pair or where or loss is not None):
        raise UsageError("--pair, --where and --loss are of trainings: give DATA.")
    fits = _fits(_rows(data, store, where or (), pair), loss, draws, plot) if data is not None else {}
    laws = fits["floating"].training_laws() if fits else [PUBLISHED]
    asked = any(value is not None for value in (parameters, tokens, compute)) or not fits
    found = forecast(laws, plan) if asked else {}
    warned = warnings_of(plan, found, published=not fits)
    if json:
        fitted = {name: _described(each) for name, each in fits.items()}
        print_json({"source": data or "arXiv:2501.02423", "fits": fitted, "forecast": found, "warnings": warned})
        return
    _print_fits(fits)
    _print_forecast(found)
    for line in warned:
        note(f"warning: {line}")


def _rows(data: str, store: str, where: Any, pair: str) -> Table:
    from nybble.lab.laws.source import read_rows
    from nybble.lab.laws.trainings import with_twins

    rows = read_rows(data, store, where)
    keys = [name.strip() for name in pair.split(",") if name.strip()]
    return with_twins(rows, keys) if keys else rows


def _fits(rows: Table, loss: str | None, draws: int, plot: Path | None) -> dict[str, Fit]:
    from nybble.lab.laws.fit import LAWS, fit
    from nybble.lab.laws.pictures import draw_fit
    from nybble.lab.laws.training import PUBLISHED
    from nybble.lab.laws.trainings import trainings

    runs = trainings(rows, PUBLISHED, loss)
    found = {name: fit(runs, name, draws=draws) for name in LAWS}
    if plot is not None:
        draw_fit(runs, found["floating"], plot)
    return found


def _described(found: Fit) -> dict[str, Any]:
    constants = {
        name: {"value": value, "low": low, "high": high}
        for name, value in found.constants.items() for low, high in [found.interval(name)]
    }  # fmt: skip
    return {"constants": constants, "rms": found.rms, "held_out": found.held_out, "runs": found.runs}


def _print_fits(fits: dict[str, Fit]) -> None:
    if not fits:
        return
    rows = [
        [name, str(each.runs), f"{100 * each.rms:.3f} %", f"{100 * each.held_out:.3f} %"] for name, each in fits.items()
    ]
    print_table("laws of the penalty", ("law", "trainings", "rms of the loss", "of trainings held out"), rows)
    best = fits["floating"]
    constants = [
        [name, f"{value:.5g}", *(f"{end:.5g}" for end in best.interval(name))] for name, value in best.constants.items()
    ]
    print_table("constants of the floating law", ("constant", "value", "95 % from", "to"), constants)


def _print_forecast(found: dict[str, Any]) -> None:
    layouts = found.pop("layouts", [])
    flat = {**found, **found.pop("best_of_compute", {})} if "best_of_compute" in found else found
    rows = [
        [name.replace("_", " "), *_numbers(value)] for name, value in flat.items()
        if isinstance(value, dict) and "value" in value
    ]  # fmt: skip
    if rows:
        print_table("forecast", ("what", "value", "95 % from", "to"), rows)
    if layouts:
        shown = [[row["format"], *_numbers(row)] for row in layouts]
        print_table("penalty of each layout, in nats a token", ("format", "penalty", "95 % from", "to"), shown)


def _numbers(value: dict[str, Any]) -> list[str]:
    return ["" if value[name] is None else f"{value[name]:.6g}" for name in ("value", "low", "high")]
