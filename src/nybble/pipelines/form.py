"""In which form a quantized model is written: compressed-tensors' where that says all of it, else nybble's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.checkpoint.card import CARD, compressed_card
from nybble.checkpoint.marked import COMPRESSED, NATIVE
from nybble.checkpoint.parts import Writer
from nybble.checkpoint.read import Checkpoint
from nybble.core.errors import FileError, ModelError, NybbleError
from nybble.core.files import atomic_write_text
from nybble.core.guard import reading
from nybble.export._ct_form import lacking
from nybble.export._source import FolderSource
from nybble.export.compressed_tensors import CompressedTensors
from nybble.qtensor.block import BlockQTensor


def writer(form: str, announce: Callable[[str], None]) -> Writer | None:
    """What writes a checkpoint in a form; None of nybble's own.

    Args:
        form: one of :data:`nybble.pipelines.targets.FORMS`.
        announce: gets a line about what others will do otherwise, or why it is nybble's own form.
    """
    if form == NATIVE:
        return None

    def write(checkpoint: Checkpoint, folder: Path, manifest: dict[str, Any]) -> str:
        with FolderSource(folder, checkpoint) as source:
            if why := _why_not(source) or (form != COMPRESSED and _grows(source)):
                if form == COMPRESSED:
                    raise FileError(
                        f"{why}. Nothing is lost: repeat the command with --resume and --form auto, which writes "
                        "nybble's own form."
                    )
                announce(f"written in nybble's own form: {why}")
                return why
            target = CompressedTensors()
            notes = target.notes(source)
            for note in notes:
                announce(note)
            text = "\n".join([target.write_model(source, folder), *(f"- {note}" for note in notes)])
            atomic_write_text(folder / CARD, compressed_card(source.config, manifest, text))
        return ""

    return write


def _grows(source: FolderSource) -> str:
    """Why the files would be larger, in a line; empty where they wouldn't."""
    for layer in source.layers.values():
        for weight in layer.weights.values():
            scale = weight.params.scale if isinstance(weight, BlockQTensor) else None
            if isinstance(scale, Tensor) and scale.dtype not in (source.dtype, torch.float32):
                kept, own = (str(dtype).removeprefix("torch.") for dtype in (scale.dtype, source.dtype))
                return (
                    f"{COMPRESSED} would keep {kept} scales of a {own} model in float32; quantized with "
                    f"scale_format=auto they are {own}"
                )
    return ""


def _why_not(source: FolderSource) -> str:
    """Why a model can't be in compressed-tensors' form, in a line; empty where it can."""
    try:
        with reading(f"{COMPRESSED}' schemes of this model", ModelError):
            found = lacking(source)
    except NybbleError as error:  # of a kind that nobody else knows
        return str(error).rstrip(".")
    more = f" (and {len(found) - 1} more reasons)" if len(found) > 1 else ""
    return f"{COMPRESSED} can't hold {found[0]}{more}" if found else ""
