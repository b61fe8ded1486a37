"""``nybble synthesise MODEL OUT``: images made of a classifier alone, to calibrate, distil or search on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from nybble.cli._options import grouped
from nybble.cli._output import is_silent, print_json
from nybble.core.files import check_new_folder
from nybble.models.named import check_model


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """:class:`nybble.training.synthesis.options.Synthesis`."""

    PANEL: ClassVar[str] = "Images"
    count: Annotated[int, typer.Option(help="Images, of all rounds together.")] = 1000
    batch: Annotated[int, typer.Option(help="Images at a time.")] = 50
    rounds: Annotated[int, typer.Option(help="Of label calibration; 1: towards classes alone.")] = 10
    keep: Annotated[str, typer.Option(help="Images of which rounds: all, last.")] = "all"
    half_steps: Annotated[int, typer.Option(help="Updates at half the resolution.")] = 2000
    full_steps: Annotated[int, typer.Option(help="Updates at all of it.")] = 3000
    canvas: Annotated[int | None, typer.Option(help="Pixels of a side that are made; 8/7 of the model's without.")] = (
        None
    )
    store: Annotated[str, typer.Option(help="window: in the model's size; canvas: all that is made.")] = "window"
    lr: Annotated[float, typer.Option(help="Highest rate of Adam.")] = 0.25
    warmup: Annotated[int, typer.Option(help="Updates in which it grows.")] = 100
    norms: Annotated[float, typer.Option(help="Weight of the BatchNorm statistics.")] = 0.01
    tv1: Annotated[float, typer.Option(help="Weight of total variation, absolute.")] = 0.0
    tv2: Annotated[float, typer.Option(help="Weight of total variation, Euclidean.")] = 1e-4
    l2: Annotated[float, typer.Option(help="Weight of the images' norm.")] = 1e-5
    strict: Annotated[bool, typer.Option(help="Updates move nothing outside their window.")] = True
    flip: Annotated[bool, typer.Option(help="Windows are mirrored at random.")] = True
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0


IMAGES = ImageOptions()


@grouped
def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A float classifier with BatchNorms: folder, hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    images: ImageOptions = IMAGES,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was killed.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Make images of MODEL without any data; --data OUT takes them wherever images are taken."""
    check_new_folder(out)
    check_model(model)
    from nybble.core.progress import Bars
    from nybble.pipelines.synthesise import synthesise  # torch comes from here on
    from nybble.training.synthesis.options import Synthesis

    options: dict[str, Any] = vars(images)
    found = synthesise(model, out, Synthesis(**options), device=device, resume=resume, progress=Bars())
    if is_silent():
        return
    if json:
        print_json(found)
        return
    print(f"{out}: {found['images']:,} images, {100 * found['agreement']:.1f} % are to the model what they were to be")
    print(f"{out}/synthesis.html shows some; nybble quantize {model} OUT2 --data {out}")


def interrupted(out: Path, **_: object) -> str:
    """What Ctrl-C left behind."""
    partial = out.with_name(f"{out.name}.partial")
    if not partial.is_dir():
        return "interrupted before anything was made; repeat the command."
    return f"interrupted. What was made is kept in {partial}; repeat the command with --resume to go on."
