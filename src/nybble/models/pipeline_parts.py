"""A pipeline's folder as diffusers saves it: which parts ``model_index.json`` names, and where they lie.

Beside the denoiser, nothing of a pipeline is changed: its files go along as they are, pickles and code left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.core.errors import FileError, ModelError
from nybble.models.build.config_file import read_json

INDEX = "model_index.json"
DENOISERS = ("transformer", "unet")
LEFT = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".py", ".msgpack", ".onnx")
"""Ends of names of what is not passed on."""
SCHEDULER = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class Parts:
    """What a pipeline is made of.

    Attributes:
        folder: of the pipeline. pipeline: its class in diffusers. classes: part -> (package, class), of all.
        denoiser: the part that is quantized.
    """

    folder: Path
    pipeline: str
    classes: dict[str, tuple[str, str]]
    denoiser: str

    def files(self) -> dict[str, Path]:
        """All files but the denoiser's, by name relative to the folder."""
        found = {INDEX: self.folder / INDEX}
        for part in self.classes:
            inside = sorted(path for path in (self.folder / part).rglob("*") if path.is_file())
            kept = inside if part != self.denoiser else []
            found |= {p.relative_to(self.folder).as_posix(): p for p in kept if p.suffix not in LEFT}
        return found


def read_parts(folder: Path) -> Parts:
    """What ``model_index.json`` says, checked against the folder; the denoiser may lie elsewhere by now.

    Raises:
        FileError: no such file, or it is malformed. ModelError: no denoiser, or a part that is named is missing.
    """
    index = read_json(folder / INDEX)
    classes: dict[str, tuple[str, str]] = {}
    for part, value in index.items():
        if part.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue
        if len(value) != 2 or not all(isinstance(word, str) for word in value) or Path(part).name != part:
            raise FileError(f"{folder / INDEX}: {part} is {value!r:.80}; a part names its package and its class.")
        classes[part] = (value[0], value[1])
    denoiser = next((part for part in DENOISERS if part in classes), "")
    if not denoiser:
        raise ModelError(f"{folder / INDEX} names no {' and no '.join(DENOISERS)}: there is nothing to quantize.")
    for part in classes:
        if part != denoiser and not (folder / part).is_dir():
            raise ModelError(f"{folder} has no {part}, which {INDEX} names; copy that folder of the pipeline, too.")
    return Parts(folder, str(index.get("_class_name", "")), classes, denoiser)


def scheduler_config(folder: Path) -> dict[str, Any]:
    """What a pipeline's folder says of its scheduler.

    Raises:
        FileError: it says nothing.
    """
    if not (folder / SCHEDULER).is_file():
        raise FileError(
            f"{folder} has no {SCHEDULER}, which says how noise becomes less; give the pipeline's folder (the one with "
            f"{INDEX}), or tensors as data."
        )
    return read_json(folder / SCHEDULER)
