"""``nybble train METHOD MODEL OUT --data SRC``: training in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from nybble.cli._options import grouped
from nybble.cli._output import note, print_json, print_table
from nybble.core.files import check_new_folder
from nybble.core.registry import Registry
from nybble.data.text import check_source
from nybble.models.named import check_model


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Sizes and rates: :class:`nybble.training.settings.TrainSettings`."""

    steps: Annotated[int | None, typer.Option(help="Updates; left out: as many as the epochs take.")] = None
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 1
    batch: Annotated[int, typer.Option(help="Examples a forward takes.")] = 1
    accumulate: Annotated[int, typer.Option(help="Forwards an update takes.")] = 16
    seq_len: Annotated[int, typer.Option(help="Most tokens of an example; longer ones lose their end.")] = 512
    lr: Annotated[float, typer.Option(help="Learning rate behind the warm-up.")] = 2e-4
    warmup: Annotated[float, typer.Option(help="Share of the updates in which the rate grows.")] = 0.03
    clip: Annotated[float, typer.Option(help="Largest norm of all gradients together.")] = 0.3
    optimizer: Annotated[
        str, typer.Option(help="Of nybble.optim or torch, perhaps with options: AdamW8bit, torch.AdamW.")
    ] = "AdamW state=none"
    checkpointing: Annotated[
        bool, typer.Option(help="Compute activations again in backward, instead of keeping them.")
    ] = True
    save_every: Annotated[int, typer.Option(help="Updates from one checkpoint to the next.")] = 100
    dtype: Annotated[str, typer.Option(help="Of forwards: bfloat16 or float32.")] = "bfloat16"
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu"
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was killed.")] = False


LOOP = LoopOptions()


@grouped
def command(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="How: qlora.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A float model, or one that is packed already.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    data: Annotated[
        str,
        typer.Option(help="Instructions as JSON lines or CSV (chat messages, or instruction and output), or text."),
    ],
    weights: Annotated[
        str | None, typer.Option(help="A quantizer line for the base, of up to 8 bits; left out: the method's own.")
    ] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="Train on the blocks of a GGUF file as they are, not on NF4 of its floats.")
    ] = False,
    set: Annotated[list[str] | None, typer.Option(help="An option of the method: rank=16; repeatable.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="An adapter to go on from; MODEL is its base.")] = None,
    eval: Annotated[str | None, typer.Option(help="Measure before and after on these held-out examples.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Also write base and adapter as one model.")] = False,
    loop: LoopOptions = LOOP,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Train MODEL in few bits; OUT gets the result and a report."""
    check_new_folder(out)
    Registry("nybble.training.methods", "training method").check(method)
    check_model(model)
    for src in (data,) if eval is None else (data, eval):
        check_source(src)
    from nybble.core.progress import Bars  # torch comes from here on
    from nybble.pipelines.train import train
    from nybble.training.optimizers import read_options
    from nybble.training.settings import TrainSettings

    result = train(
        method, model, out, data, weights=weights, packed=packed, options=read_options(set or [], "--set"),
        adapter=adapter, judged_on=eval, merge=merge, settings=TrainSettings(**vars(loop)), progress=Bars(),
        announce=note,
    )  # fmt: skip
    print_json(result) if json else _print(result)


def interrupted(out: Path, **_: object) -> str:
    """What Ctrl-C left behind."""
    partial = out.with_name(f"{out.name}.partial")
    if not partial.is_dir():
        return "interrupted; nothing was written."
    return f"interrupted. What was done is kept in {partial}; repeat the command with --resume to go on."


def _print(result: dict[str, Any]) -> None:
    first, last = (f"{result['curve'][i][1]:.4f}" for i in (0, -1))
    print(f"{result['out']}: {result['steps']:,} updates, loss {first} -> {last}, {result['seconds']:.0f} s")
    print(f"{result['out']}/report.html shows it; open it in any browser")
    if result["evaluation"] is not None:
        models = result["evaluation"]["models"]
        rows = [[name, *(f"{value:.4f}" for value in found.values())] for name, found in models.items()]
        print_table("held-out examples", ("model", *models["before"]), rows)
