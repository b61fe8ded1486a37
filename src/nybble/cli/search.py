"""``nybble search MODEL OUT --budget bits=4.0``: which format each layer gets, or which architecture a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from nybble.cli._options import grouped
from nybble.cli._output import note, print_json, print_table
from nybble.core.errors import UsageError
from nybble.core.files import check_new_folder
from nybble.data.text import check_source
from nybble.models.named import check_model
from nybble.recipes.search import check_search_recipe


@dataclass(frozen=True, kw_only=True)
class SizeOptions:
    """:class:`nybble.pipelines.search.SearchSettings`."""

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


@dataclass(frozen=True, kw_only=True)
class FormatOptions:
    """What methods that choose a format a layer take."""

    PANEL: ClassVar[str] = "Formats"
    menu: Annotated[str, typer.Option(help="Formats to choose from: names or quantizer lines, commas between.")] = (
        "int2,int3,int4,int8"
    )
    activations: Annotated[str | None, typer.Option(help="A quantizer line for the inputs of all layers.")] = None
    ignore: Annotated[list[str] | None, typer.Option(help="A layer to leave in float; repeatable.")] = None
    target: Annotated[
        list[str] | None, typer.Option(help="An export target that has to hold every format; repeatable.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ArchitectureOptions:
    """What methods that find an architecture take."""

    PANEL: ClassVar[str] = "Architectures"
    set: Annotated[list[str] | None, typer.Option(help="An option of the method: retrain.steps=100; repeatable.")] = (
        None
    )
    eval: Annotated[str | None, typer.Option(help="Held-out examples to judge with: a SRC.")] = None


FORMATS, ARCHITECTURES = FormatOptions(), ArchitectureOptions()
SHARED = ("seq_len", "device", "seed", "resume")
"""Options of :class:`SizeOptions` that a search of an architecture has too."""


@grouped
def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A float model: folder, hub id, demo:smollm2.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    budget: Annotated[str, typer.Option(help="The most that all layers may take: bits=4.0, bytes=N, bops=N.")],
    method: Annotated[
        str, typer.Option(help="How: fisher, hawq, vit-slim ... (nybble recipes lists them); or a YAML file.")
    ] = "fisher",
    data: Annotated[
        str | None, typer.Option(help="A SRC: calibration data, builtin without; or what an architecture trains on.")
    ] = None,
    formats: FormatOptions = FORMATS,
    architectures: ArchitectureOptions = ARCHITECTURES,
    sizes: SizeOptions = SIZES,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Choose a format for each layer of MODEL: OUT gets a scheme. Or find an architecture: OUT is a model."""
    check_new_folder(out)
    check_search_recipe(method)
    check_model(model)
    for src in (data, architectures.eval):
        if src is not None:
            check_source(src)
    from nybble.core.progress import Bars  # torch comes from here on
    from nybble.search.recipe import ArchitectureRecipe, load_search_recipe

    if isinstance(load_search_recipe(method), ArchitectureRecipe):
        result = _architecture(model, out, budget, method, data, formats, architectures, sizes)
        print_json(result) if json else _print_architecture(out, result)
        return
    _unused(method, "chooses formats", architectures, ARCHITECTURES)
    from nybble.pipelines.search import SearchSettings, search

    result = search(
        model, out, budget=budget, menu=formats.menu, method=method, data="builtin" if data is None else data,
        activations=formats.activations, ignore=("lm_head", *(formats.ignore or ())), targets=formats.target or (),
        settings=SearchSettings(**vars(sizes)), progress=Bars(), announce=note,
    )  # fmt: skip
    print_json(result) if json else _print(out, result)


def _architecture(
    model: str, out: Path, budget: str, method: str, data: str | None,
    formats: FormatOptions, architectures: ArchitectureOptions, sizes: SizeOptions,
) -> dict[str, Any]:  # fmt: skip
    from nybble.core.progress import Bars
    from nybble.pipelines.search_architecture import ArchitectureSettings, search_architecture
    from nybble.training.optimizers import read_options

    for given, usual in ((formats, FORMATS), (sizes, SIZES)):
        _unused(method, "finds an architecture", given, usual)
    return search_architecture(
        model, out, budget=budget, method=method, data=data, judged_on=architectures.eval,
        options=read_options(architectures.set or [], "--set"), progress=Bars(), announce=note,
        settings=ArchitectureSettings(**{name: getattr(sizes, name) for name in SHARED}),
    )  # fmt: skip


def _unused(method: str, what: str, given: object, usual: object) -> None:
    """Refuse options that a method would not look at."""
    for name, value in vars(given).items():
        if name not in SHARED and value != getattr(usual, name):
            raise UsageError(f"method {method!r} {what}; --{name.replace('_', '-')} says nothing to it, leave it out.")


def interrupted(out: Path, **_: object) -> str:
    """What Ctrl-C left behind."""
    partial = out.with_name(f"{out.name}.partial")
    if not partial.is_dir():
        return "interrupted before anything was measured; repeat the command."
    return f"interrupted. What was measured is kept in {partial}; repeat the command with --resume to go on."


def _print(out: Path, result: dict[str, Any]) -> None:
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


def _print_architecture(out: Path, result: dict[str, Any]) -> None:
    if rows := result["compared"]:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        print_table("", columns, [[_cell(row.get(key)) for key in columns] for row in rows])
    measures = "".join(f", {name} {value:.4g}" for name, value in result["measures"].items())
    print(f"{out}: {result['cost']:,} of {result['full']:,} {result['unit']}{measures}")
    print(f"{out}/search.html shows it; quantize, eval, train and export take {out} as any model")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
