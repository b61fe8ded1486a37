"""``nybble recommend --memory 8GB``: which model, format and recipe fit, and the command that makes the file."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nybble.cli._output import megabytes, note, print_json, print_table


def command(
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="[DATA]",
            help="Measured runs: a .parquet file of nybble lab export, a .csv file, or a sweep's name.",
        ),
    ] = None,
    memory: Annotated[str | None, typer.Option(help="For weights and KV cache: 8GB, 6GiB, 500MB.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of a text that the cache holds.")] = 8192,
    batch: Annotated[int, typer.Option(help="Texts at a time.")] = 1,
    metric: Annotated[str, typer.Option(help="The column that is judged.")] = "nll",
    high: Annotated[bool, typer.Option("--high", help="The largest is best, as of accuracies.")] = False,
    paired: Annotated[str, typer.Option(help="A column whose values all candidates share: judged_on.")] = "",
    limit: Annotated[int, typer.Option(help="Rows.")] = 10,
    parameters: Annotated[float | None, typer.Option(help="Of a training: weights of the linear layers.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Of a training: tokens.")] = None,
    compute: Annotated[float | None, typer.Option(help="Of a training: FLOPs.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="Only these runs: 'recipe=gptq', 'model=*llama*'; repeatable, all hold.")
    ] = None,
    store: Annotated[
        str, typer.Option(help="Where a sweep is kept: a SQLite file, or postgresql://USER:PASSWORD@HOST/DB.")
    ] = "lab.sqlite",
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Rank what was measured and fits a memory; or, of a training, the format and block size for its size and data."""
    from nybble.core.errors import UsageError
    from nybble.core.options import at_least_one

    if any(value is not None for value in (parameters, tokens, compute)):
        if data is not None or memory is not None:
            raise UsageError(
                "a training has --parameters, --tokens, --compute; a memory is of measured runs. Ask apart."
            )
        _training(parameters, tokens, compute, json)
        return
    if data is None or memory is None:
        raise UsageError("give measured runs and --memory (or, of a training, --parameters, --tokens, --compute).")
    at_least_one(limit=limit)
    from nybble.lab.laws.source import read_rows
    from nybble.lab.recommend import Budget, best_first, read_memory, recommend

    budget = Budget(memory=read_memory(memory), context=context, batch=batch)
    found = recommend(read_rows(data, store, where or ()), budget, metric=metric, high=high, paired=paired)
    rows = best_first(found, limit)
    if json:
        print_json({"memory": budget.memory, "fit": len(found), "metric": metric, "candidates": rows})
        return
    print_table(
        f"{len(found)} candidates fit {megabytes(budget.memory)}, {context:,} tokens, batch {batch}",
        ("model", "recipe", "weights as", "weights", "cache", metric, "95 % from", "to", "best in draws"),
        [_row(row) for row in rows],
    )
    if any(row["repeats"] == 1 for row in rows):
        note("runs without repeats have no interval: repeat them with other seeds, or on other texts (--paired).")
    print(rows[0]["command"])


def _row(row: dict[str, Any]) -> list[str]:
    interval = ["" if row["repeats"] == 1 else f"{row[name]:.4f}" for name in ("low", "high")]
    return [
        str(row["model"]), str(row.get("recipe", "rtn")), str(row.get("weights") or row.get("scheme") or ""),
        megabytes(row["weights_bytes"]), megabytes(row["cache_bytes"]), f"{row['quality']:.4f}", *interval,
        "" if row["repeats"] == 1 else f"{100 * row['sure']:.0f} %",
    ]  # fmt: skip


def _training(parameters: float | None, tokens: float | None, compute: float | None, json: bool) -> None:
    from nybble.lab.laws.advice import advise, named

    found = advise(parameters, tokens, compute)
    if json:
        print_json(found)
        return
    rows = [
        [row["format"], str(row["block"]), f"{row['loss']:.5f}", f"{row['penalty']:.5f}", f"{row['critical_data']:.3g}"]
        for row in found["formats"]
    ]
    title = f"N = {found['N']:.4g}, D = {found['D']:.4g}: bfloat16 {found['bf16']:.5f}, best width {found['bits']:.2f}"
    print_table(title, ("format", "block", "loss", "penalty", "more data harm from"), rows)
    for line in found["warnings"]:
        note(f"warning: {line}")
    print(named(found["chosen"]))
