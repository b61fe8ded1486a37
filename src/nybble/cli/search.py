"""``nybble search MODEL OUT --budget bits=4.0``: which format each layer gets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from nybble.cli._options import grouped
from nybble.cli._output import note, print_json, print_table
from nybble.core.files import check_new_folder
from nybble.data.text import check_source
from nybble.models.named import check_model
from nybble.recipes.search import check_search_recipe


@dataclass(frozen=True, kw_only=True)
class SizeOptions:
    """:class:`nybble.pipelines.search_job.SearchSettings`."""

    PANEL: ClassVar[str] = "Sizes and run"
    samples: Annotated[int, typer.Option(help="Calibration samples, and as many held-out ones.")] = 16
    seq_len: Annotated[int, typer.Option(help="Tokens of one.")] = 256
    batch: Annotated[int, typer.Option(help="Samples a forward takes.")] = 1
    random: Annotated[int, typer.Option(help="Random assignments to compare with; 0 compares with nothing.")] = 20
    dtype: Annotated[str, typer.Option(help="Of the float model: float32 or bfloat16.")] = "float32"
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu"
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was killed.")] = False


SIZES = SizeOptions()


@grouped
def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A float model: folder, hub id, demo:smollm2.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    budget: Annotated[
        str, typer.Option(help="The most that all layers may take: bits=4.0, bytes=N, bops=N, latency=MS.")
    ],
    menu: Annotated[
        str, typer.Option(help="Formats to choose from: names or quantizer lines, commas between.")
    ] = "int2,int3,int4,int8",
    method: Annotated[str, typer.Option(help="How: fisher, hawq, kl, linearity ...; or a YAML file.")] = "fisher",
    data: Annotated[str, typer.Option(help="Calibration data: a SRC; builtin without.")] = "builtin",
    activations: Annotated[str | None, typer.Option(help="A quantizer line for the inputs of all layers.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="A layer to leave in float; repeatable.")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="An export target that has to hold every format; repeatable.")
    ] = None,
    eval: Annotated[str | None, typer.Option(help="Of a method that trains: held-out examples to measure on.")] = None,
    set: Annotated[
        list[str] | None, typer.Option(help="Of its training: a setting, as steps=2000 or lr=1e-3; repeatable.")
    ] = None,
    sizes: SizeOptions = SIZES,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Choose a format for each layer of MODEL; OUT gets a scheme, and a page about it."""
    check_new_folder(out)
    check_search_recipe(method)
    check_model(model)
    check_source(data)
    from nybble.core.progress import Bars  # torch comes from here on
    from nybble.pipelines.search import search
    from nybble.pipelines.search_job import SearchSettings
    from nybble.training.optimizers import read_options

    result = search(
        model, out, budget=budget, menu=menu, method=method, data=data, activations=activations,
        ignore=("lm_head", *(ignore or ())), targets=target or (), judged_on=eval,
        training=read_options(set or [], "--set"), settings=SearchSettings(**vars(sizes)), progress=Bars(),
        announce=note,
    )  # fmt: skip
    print_json(result) if json else _print(out, result)


def interrupted(out: Path, **_: object) -> str:
    """What Ctrl-C left behind."""
    partial = out.with_name(f"{out.name}.partial")
    if not partial.is_dir():
        return "interrupted before anything was measured; repeat the command."
    return f"interrupted. What was measured is kept in {partial}; repeat the command with --resume to go on."


def _print(out: Path, result: dict[str, Any]) -> None:
    if "policy" in result:
        _print_trained(out, result)
        return
    drawn = sorted(row["kl"] for row in result["compared"] if row["name"].startswith("random "))
    rows = [
        [row["name"], f"{row['cost']:,.6g}", f"{row['loss']:.4g}", "" if row["kl"] is None else f"{row['kl']:.4g}"]
        for row in result["compared"]
        if not row["name"].startswith("random ")
    ]
    if drawn:
        rows.append(
            [f"random, median of {len(drawn)}", f"<= {result['cost']:,.6g}", "", f"{drawn[len(drawn) // 2]:.4g}"]
        )
    print_table("", ("choice", result["unit"], "expected loss", "divergence, held out"), rows)
    print(f"{out}/scheme.yaml: nybble quantize MODEL OUT --scheme {out}/scheme.yaml")
    print(f"{out}/search.html shows it; open it in any browser")


def _print_trained(out: Path, result: dict[str, Any]) -> None:
    rows = [
        [row["name"], f"{row['cost']:,.6g}", "" if row["fits"] else "above the budget"] for row in result["compared"]
    ]
    print_table("", ("choice", result["unit"], ""), rows)
    print(f"{out}/model is trained in the formats found; {out}/scheme.yaml has them for another training")
    print(f"{out}/search.html and {out}/model/report.html show it; open them in any browser")
