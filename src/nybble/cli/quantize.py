"""``nybble quantize MODEL OUT --recipe R``: the main job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli._options import grouped
from nybble.cli._output import is_silent, megabytes, note, print_json, print_table
from nybble.core.files import check_new_folder
from nybble.data.text import check_source
from nybble.models.build.config_file import read_json
from nybble.models.named import check_float, check_model, stated_quantization
from nybble.pipelines.targets import AUTO, check_form_name, meant, split_targets
from nybble.recipes import BEST, check_recipe_name, recipe_for
from nybble.report.learning import unmoved

if TYPE_CHECKING:
    from nybble.recipe import Recipe
    from nybble.walk.settings import Settings


@dataclass(frozen=True, kw_only=True)
class SchemeOptions:
    """What changes the recipe's scheme."""

    scheme: Annotated[
        str | None, typer.Option(help="A scheme preset (W4A16, NVFP4 ...) or a YAML file, in place of the recipe's.")
    ] = None
    weights: Annotated[str | None, typer.Option(help="A quantizer line for weights: 'float4_e2m1fn group=32'.")] = None
    activations: Annotated[
        str | None,
        typer.Option(help="A quantizer line for inputs: 'float8_e4m3fn token'; 'none' leaves them in float."),
    ] = None
    embeddings: Annotated[
        str | None,
        typer.Option(help="A quantizer line for embeddings and the head tied to them: 'float4_e2m1fn channel'."),
    ] = None
    matmuls: Annotated[
        str | None,
        typer.Option(
            help="A quantizer line for the operands of attention: 'float8_e4m3fn tensor static', 'int8 token "
            "probabilities=(uint8 token)'."
        ),
    ] = None
    kv: Annotated[
        str | None,
        typer.Option(
            help="A quantizer line for the KV cache: 'int4 group=32', 'keys=(bfp12) values=(int8 token) residual=32'."
        ),
    ] = None
    ignore: Annotated[
        list[str] | None, typer.Option(help="A module to leave alone (name, class or re:PATTERN); repeatable.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Sizes, device, seed: :class:`nybble.walk.settings.Settings`."""

    samples: Annotated[
        int | None, typer.Option(help="Calibration sequences; left out: 128, or as many as the data has.")
    ] = None
    seq_len: Annotated[int, typer.Option(help="Tokens in each.")] = 512
    batch: Annotated[int, typer.Option(help="Sequences a forward takes.")] = 8
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu"
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was killed.")] = False
    spill: Annotated[bool, typer.Option("--spill", help="Keep hidden states in a file instead of memory.")] = False


RUN = RunOptions()
CHANGES = SchemeOptions()


@grouped
def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file, or demo:smollm2.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    changes: SchemeOptions = CHANGES,
    recipe: Annotated[
        str, typer.Option(help="A method: nybble recipes lists them; or a YAML file. Left out: what measured best.")
    ] = BEST,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="What the recipe best is to come to (w4a16, the usual, w3a16, w2a16, nvfp4 ...), or who is to load "
            "what nybble export makes of OUT (compressed-tensors ...): the scheme is kept to what that holds exactly; "
            "gguf:q4_k_m also writes OUT/gguf. Both may be given; repeatable."
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            help="Of the files: compressed-tensors, which vLLM and transformers load without nybble; native; or auto, "
            "the first where it says all of the result exactly."
        ),
    ] = AUTO,
    data: Annotated[
        str,
        typer.Option(
            help="Calibration data: a text file, JSONL, hub dataset id, or builtin; images; a folder of WAV files; "
            "synthetic[:COUNT]."
        ),
    ] = "builtin",
    run: RunOptions = RUN,
    effort: Annotated[
        str, typer.Option(help="quick: fewer steps and candidates, where a recipe has such. Or full.")
    ] = "full",
    eval: Annotated[str | None, typer.Option(help="Evaluate before and after on this text.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would be done and needed, and stop.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Quantize MODEL into the folder OUT."""
    aim, _ = split_targets(target)
    check_form_name(form)
    _check(model, out, recipe_for(recipe, aim), data, eval)
    from nybble.pipelines.request import build_recipe
    from nybble.walk.settings import Settings

    settings = Settings(**vars(run))
    asked: dict[str, Any] = {**vars(changes), "target": target, "ignore": changes.ignore or ()}
    files = meant(recipe, asked).files
    made = build_recipe(recipe, effort=effort, **asked)
    from nybble.core import ranks  # torch comes from here on: all above needs none

    with ranks.started(run.device) as device:
        result = _done(model, out, made, data, replace(settings, device=device), files, eval, dry_run, form)
    if json:
        print_json(result)
    elif dry_run:
        print("\n".join(result["preflight"]))
    elif result:
        _print(result)


def _done(
    model: str,
    out: Path,
    made: Recipe,
    data: str,
    settings: Settings,
    files: Sequence[str],
    eval: str | None,
    dry_run: bool,
    form: str,
) -> dict[str, Any]:
    """What is said of it in the end; nothing by a process beside the one that writes."""
    from nybble.checkpoint.account import inspect
    from nybble.checkpoint.marked import form_of
    from nybble.core.progress import Bars
    from nybble.pipelines.evaluate import judge_folder, judged_on
    from nybble.pipelines.quantize import preflight, quantize

    held_out = None if eval is None else judged_on(model, eval, seq_len=settings.seq_len)
    if dry_run:
        lines = preflight(model, made, data, out=out, settings=settings, form=form, target=files)
        return {"dry_run": True, "recipe": made.name, "preflight": lines}
    _, report = quantize(
        model, made, data, out=out, settings=settings, progress=Bars(), announce=note, form=form, target=files
    )
    if is_silent():
        return {}
    evaluation = None
    if held_out is not None:
        found = judge_folder(out, model, held_out, device=str(settings.device), progress=Bars())
        evaluation = {**found["models"], "data": found["data"], "samples": found["samples"]}
    sizes = inspect(out)
    result: dict[str, Any] = {
        "out": str(out),
        "recipe": made.name,
        "form": form_of(out),
        "weights": len(report.layers),
        "seconds": report.seconds,
        "bits_per_weight": sizes["bits_per_weight"],
        "bits_per_quantized_weight": sizes["bits_per_quantized_weight"],
        "bytes": sizes["total"] - sum(made["bytes"] for made in report.exported),
        "layers": [{k: v for k, v in r.to_dict().items() if not k.endswith("picture")} for r in report.layers],
    }
    if evaluation is not None:
        result["evaluation"] = evaluation
    result["exported"] = [
        {key: made[key] for key in ("dest", "target", "bytes", "files", "notes")} for made in report.exported
    ]
    return result


def _check(model: str, out: Path, recipe: str, data: str, held_out: str | None) -> None:
    """Refuse what can be seen to be wrong without torch, which takes seconds to load."""
    check_new_folder(out)
    check_recipe_name(recipe)
    check_model(model)
    if (config := Path(model) / "config.json").is_file():
        check_float(model, stated_quantization(Path(model), read_json(config)))
    for src in (data,) if held_out is None else (data, held_out):
        check_source(src)


def interrupted(out: Path, **_: object) -> str:
    """What Ctrl-C left behind."""
    partial = out.with_name(f"{out.name}.partial")
    if not partial.is_dir():
        return "interrupted; nothing was written."
    from nybble.checkpoint.parts import holds_finished

    if not holds_finished(partial):
        return "interrupted before anything was finished; repeat the command."
    return f"interrupted. What was finished is kept in {partial}; repeat the command with --resume to go on."


def _print(result: dict[str, Any]) -> None:
    print(
        f"{result['out']}: {megabytes(result['bytes'])}, "
        f"{result['bits_per_weight']:.3f} bits a weight over everything stored "
        f"({result['bits_per_quantized_weight']:.3f} in quantized layers), {result['seconds']:.0f} s"
    )
    for made in result["exported"]:
        largest = max(made["files"], key=made["files"].get)
        print(f"{made['dest']}/{largest}: {made['target']}, {megabytes(made['files'][largest])}")
    if said := unmoved(result["layers"]):
        print(f"{said} (no step lost less than the start, which was kept)")
    worst = sorted(result["layers"], key=lambda row: -(row["error"] or 0))[:5]
    rows = [
        [r["name"], f"{r['bits']:.2f}", f"{r['error']:.2e}", f"{r['rtn_error']:.2e}", "; ".join(r["notes"])]
        for r in worst
        if r["error"] is not None
    ]
    if rows:
        print_table("largest relative output errors", ("layer", "bits", "error", "round to nearest", "notes"), rows)
    if "evaluation" in result:
        found = {name: result["evaluation"][name] for name in ("float", "quantized")}
        columns = list(found["float"])
        shown = [[name, *(f"{values[column]:.4f}" for column in columns)] for name, values in found.items()]
        print_table("evaluation", ("model", *columns), shown)
