"""Another library's quantized folder as one of nybble's own, a block in memory at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from nybble.checkpoint.parts import Parts
from nybble.checkpoint.save import model_config, save_generation_config
from nybble.core.files import AtomicFolder
from nybble.models.build.packed import cache_of, packed_blocks
from nybble.models.sources.folder import FolderSource
from nybble.models.sources.side_files import copy_side_files


@torch.no_grad()
def copy_as_own(source: FolderSource, out: Path, dtype: torch.dtype) -> Path:
    """Write what :func:`nybble.save` would of the whole model.

    Args:
        source: with packed weights.
        out: must not exist.
        dtype: of what is in float.

    Raises:
        ModelError: tensors that don't fit the model. FileError: damaged ones, or ``out`` can't be written.
    """
    with AtomicFolder(out) as room:
        parts = Parts(room, {}, resume=False)
        written: list[str] = []
        blocks: list[str] = []
        for prefix, module in packed_blocks(source, dtype):
            written.append(f"part-{len(written):05d}")
            elsewhere = () if prefix else tuple(blocks)
            parts.write(written[-1], prefix, module, [], partial(_begins, elsewhere))
            blocks.append(prefix)
            model = module
        save_generation_config(model, room)
        parts.assemble(written, model_config(model, dtype), {}, cache_of(source))
        parts.finish()
        copy_side_files(source.side_files(), room)
    return out


def _begins(prefixes: tuple[str, ...], name: str) -> bool:
    return name.startswith(prefixes)
