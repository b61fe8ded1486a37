"""``nybble synthesise MODEL OUT``: images that a classifier's BatchNorms remember, with the model's own answers.

    OUT/images.npz        images (uint8), labels, the model's logits, as nybble.data.images has them: ``--data OUT``
    OUT/synthesis.json    what was asked, and what came of each round
    OUT/synthesis.html    some images of each round

Until all is there it is OUT.partial, with a file a round in it: a killed run goes on behind the last of them.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nybble.checkpoint.marked import is_quantized
from nybble.core.device import check_device, out_of_memory
from nybble.core.errors import ModelError
from nybble.core.explicit import explicit_settings
from nybble.core.files import AtomicFolder, atomic_write_json, atomic_write_text, new_folder
from nybble.core.progress import Progress, Silent
from nybble.core.seeds import preserve_global_rng
from nybble.core.versions import versions
from nybble.data.images import SYNTHESISED, Preparation, preparation_for
from nybble.data.labelled import class_names
from nybble.models.adapter import reads_of
from nybble.models.sources.open import open_source
from nybble.pipelines.begun import REQUEST, begin
from nybble.report.synthesised import render
from nybble.training.norms import running_norms
from nybble.training.synthesis.folder import clear, made_in, stored, write_images
from nybble.training.synthesis.images import Made, Maker
from nybble.training.synthesis.options import Synthesis


@explicit_settings()
def synthesise(
    model: str | Path,
    out: str | Path,
    options: Synthesis | None = None,
    *,
    device: str = "cpu",
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make images of a classifier, without any data.

    Args:
        model: what ``nybble.load`` takes; a float classifier of images with BatchNorms.
        out: the folder to write; see the module.
        options: how many, and how.
        device: where to run.
        resume: go on from what a killed run left, to the same bytes.
        progress: told of updates.

    Returns:
        What synthesis.json holds.

    Raises:
        NybbleError: the folder exists, or was begun with another request; the model has no BatchNorm, or reads no
            images; a canvas smaller than its images.
    """
    options, out = options or Synthesis(), new_folder(out, model)
    check_device(device)
    if is_quantized(Path(model)):
        raise ModelError(f"{model} is quantized, its BatchNorms are folded; give the float model it was made from.")
    with preserve_global_rng(), out_of_memory(device):
        maker = _maker(str(model), options, device)
        with AtomicFolder(out, resumable=True) as partial:
            begin(partial, {"model": str(model), "device": device, **asdict(options)}, resume)
            made = made_in(maker, partial, progress or Silent())
            result = _written(maker, made, partial)
            clear(partial)
            (partial / REQUEST).unlink()
    return result


def _maker(model: str, options: Synthesis, device: str) -> Maker:
    """Everything that can be wrong, before weights are read."""
    source = open_source(model)
    described: Any = source.skeleton(torch.float32)
    classes = class_names(source.config)
    if reads_of(described) != "images" or len(classes) < 2:
        raise ModelError(f"{model} is a {type(described).__name__}; images are made of classifiers of images.")
    if not running_norms(described):
        raise ModelError(
            f"{model} is a {type(described).__name__} without BatchNorms, whose statistics are what images are made "
            "of; take a convolutional classifier."
        )
    wants: Preparation = preparation_for(source.config, source.preprocessing())
    for side in (wants.height, wants.width):
        options.side(side)
    return Maker(source.model(torch.float32, torch.device(device)), wants, len(classes), options)


def _written(maker: Maker, made: list[list[Made]], partial: Path) -> dict[str, Any]:
    """The files; batches in turn, of each its rounds in turn."""
    options = maker.options
    labels, logits = write_images(maker, made, partial / SYNTHESISED)
    counts = torch.bincount(labels, minlength=maker.classes)
    first = 0 if options.keep == "all" else options.rounds - 1
    result = {
        "format_version": 1, "request": json.loads((partial / REQUEST).read_text(encoding="utf-8")),
        "images": len(labels), "size": list(stored(maker, made[0][0].images).shape[1:]), "classes": maker.classes,
        "smallest": int(counts.min()), "largest": int(counts.max()), "agreement": _agreement(labels, logits),
        "rounds": [_round(first + i, [rounds[i] for rounds in made]) for i in range(len(made[0]))],
        "versions": versions(),
    }  # fmt: skip
    atomic_write_json(partial / "synthesis.json", result)
    pictures = [stored(maker, torch.cat([rounds[i].images for rounds in made[:4]])) for i in range(len(made[0]))]
    atomic_write_text(partial / "synthesis.html", render(result, pictures))
    return result


def _agreement(labels: Tensor, logits: Tensor) -> float:
    return float((logits.argmax(-1) == labels).double().mean())


def _round(number: int, made: list[Made]) -> dict[str, Any]:
    """Means over batches; the entropy is that of the model's answers, which the next round is made towards."""
    labels, logits = (torch.cat([getattr(each, name) for each in made]) for name in ("labels", "logits"))
    chances = logits.double().softmax(-1)
    return {
        "round": number, "loss": float(np.mean([each.loss for each in made])),
        "distance": float(np.mean([each.distance for each in made])), "agreement": _agreement(labels, logits),
        "entropy": float(torch.special.entr(chances).sum(-1).mean()),
    }  # fmt: skip
