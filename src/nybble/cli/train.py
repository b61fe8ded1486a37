"""``nybble train RECIPE MODEL OUT --data SRC``: training in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from nybble.cli._options import grouped
from nybble.cli._output import is_silent, note, print_json, print_table
from nybble.core.files import check_new_folder
from nybble.data.text import check_source
from nybble.models.named import check_model
from nybble.pipelines.targets import AUTO
from nybble.recipes.training import SELF, check_training_recipe


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Sizes and rates: :class:`nybble.training.settings.TrainSettings`; what is left out is the recipe's."""

    PANEL: ClassVar[str] = "Sizes and rates (left out: the recipe's)"
    steps: Annotated[int | None, typer.Option(help="Updates; left out: as many as the epochs take.")] = None
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None
    batch: Annotated[int | None, typer.Option(help="Examples a forward takes.")] = None
    accumulate: Annotated[int | None, typer.Option(help="Forwards an update takes.")] = None
    seq_len: Annotated[int | None, typer.Option(help="Most tokens of an example; longer ones lose their end.")] = None
    lr: Annotated[float | None, typer.Option(help="Learning rate behind the warm-up.")] = None
    warmup: Annotated[float | None, typer.Option(help="Share of the updates in which the rate grows.")] = None
    schedule: Annotated[str | None, typer.Option(help="Of the rate from there on: constant, linear or cosine.")] = None
    clip: Annotated[float | None, typer.Option(help="Largest norm of all gradients together.")] = None
    optimizer: Annotated[
        str | None, typer.Option(help="Of nybble.optim or torch, perhaps with options: AdamW8bit, torch.AdamW.")
    ] = None
    checkpointing: Annotated[
        bool | None,
        typer.Option("--checkpointing/--no-checkpointing", help="Compute activations again in backward, or keep them."),
    ] = None
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Run blocks through torch.compile, one by one.")
    ] = None
    augment: Annotated[
        str | None, typer.Option(help="Of images in training: flip, crop=PIXELS, or both ('flip crop=4').")
    ] = None
    dtype: Annotated[str | None, typer.Option(help="Of forwards: bfloat16 or float32.")] = None


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What else the settings have: where and from which seed it runs."""

    PANEL: ClassVar[str] = "Run"
    save_every: Annotated[int | None, typer.Option(help="Updates from one checkpoint to the next.")] = None
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu"
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was killed.")] = False


LOOP, RUN = LoopOptions(), RunOptions()


@dataclass(frozen=True, kw_only=True)
class SchemeOptions:
    """What changes the recipe's scheme."""

    PANEL: ClassVar[str] = "Scheme (left out: the recipe's)"
    scheme: Annotated[
        str | None, typer.Option(help="A scheme preset (W4A16, NVFP4 ...) or a YAML file, in place of the recipe's.")
    ] = None
    weights: Annotated[
        str | None, typer.Option(help="A quantizer line for weights; of qlora's base one of up to 8 bits.")
    ] = None
    activations: Annotated[
        str | None, typer.Option(help="A quantizer line for inputs; 'none' leaves them in float.")
    ] = None
    kv: Annotated[str | None, typer.Option(help="A quantizer line for the KV cache.")] = None


CHANGES = SchemeOptions()


@grouped
def command(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="How: qlora, llm-qat ... (nybble recipes lists them); or a YAML file."),
    ],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A float model, or one that is packed already.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Examples as JSON lines or CSV: of language models chat messages, instruction and output, or text; of "
            "classifiers text and label; of translators source and target. Of image classifiers an IDX file, .npz or a "
            "folder of folders. self:COUNT: texts of the model's own. Left out: what the recipe says."
        ),
    ] = None,
    changes: SchemeOptions = CHANGES,
    packed: Annotated[
        bool, typer.Option("--packed", help="Train on the blocks of a GGUF file as they are, not on NF4 of its floats.")
    ] = False,
    set: Annotated[list[str] | None, typer.Option(help="An option of the recipe: rank=16; repeatable.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="An adapter to go on from; MODEL is its base.")] = None,
    eval: Annotated[str | None, typer.Option(help="Measure before and after on these held-out examples.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="The float model that losses compare with; left out: MODEL.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Also write base and adapter as one model.")] = False,
    form: Annotated[str, typer.Option(help="Of a packed model's files: compressed-tensors, native, or auto.")] = AUTO,
    loop: LoopOptions = LOOP,
    run: RunOptions = RUN,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Train MODEL in few bits; OUT gets the result and a report."""
    check_new_folder(out)
    check_training_recipe(recipe)
    check_model(model)
    for src in (data, eval):
        if src is not None and src.partition(":")[0] != SELF:
            check_source(src)
    from nybble.core import ranks  # torch comes from here on
    from nybble.core.progress import Bars
    from nybble.pipelines.train import train
    from nybble.training.optimizers import read_options

    settings = {**vars(loop), **vars(run)}
    with ranks.started(run.device):  # which makes a GPU of its own "cuda"
        result = train(
            recipe, model, out, data, **vars(changes), packed=packed, options=read_options(set or [], "--set"),
            adapter=adapter, judged_on=eval, teacher=teacher, merge=merge, form=form, settings=settings,
            progress=Bars(), announce=note,
        )  # fmt: skip
    if is_silent():
        return
    print_json(result) if json else _print(result)


def interrupted(out: Path, **_: object) -> str:
    """What Ctrl-C left behind."""
    partial = out.with_name(f"{out.name}.partial")
    if not partial.is_dir():
        return "interrupted before anything was finished; repeat the command."
    return f"interrupted. What was done is kept in {partial}; repeat the command with --resume to go on."


def _print(result: dict[str, Any]) -> None:
    first, last = (f"{result['curve'][i][1]:.4f}" for i in (0, -1))
    print(f"{result['out']}: {result['steps']:,} updates, loss {first} -> {last}, {result['seconds']:.0f} s")
    print(f"{result['out']}/report.html shows it; open it in any browser")
    if result["evaluation"] is not None:
        models = result["evaluation"]["models"]
        rows = [[name, *(f"{value:.4f}" for value in found.values())] for name, found in models.items()]
        print_table("held-out examples", ("model", *models["before"]), rows)
