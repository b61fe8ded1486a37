"""The state of a model in training as a file of tensors: everything in its state dict, once each."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from nybble.core.errors import FileError
from nybble.core.files import atomic_write_bytes
from nybble.core.guard import reading


def save_state(model: nn.Module, path: Path) -> None:
    """Write the state dict; of tensors that share a storage the first."""
    atomic_write_bytes(path, to_bytes({key: t.detach().cpu().contiguous() for key, t in _once(model).items()}))


@torch.no_grad()
def load_state(model: nn.Module, path: Path) -> None:
    """Read what :func:`save_state` wrote into a model of the same make.

    Raises:
        FileError: the file is damaged, or of another model.
    """
    with reading(path):
        found = load_file(path)
    own = _once(model)
    if own.keys() != found.keys():
        other = sorted(own.keys() ^ found.keys())[0]
        raise FileError(f"{path} is of another model: {other} is in one of them alone.")
    for key, t in own.items():
        if t.shape != found[key].shape:
            raise FileError(f"{path} is of another model: {key} is {list(found[key].shape)} in it.")
    model.load_state_dict(found, strict=False)


def _once(model: nn.Module) -> dict[str, Tensor]:
    seen: set[tuple[int, int]] = set()
    kept = {}
    for key, t in model.state_dict().items():
        place = (t.data_ptr(), t.numel())
        if t.numel() and place in seen:
            continue
        seen.add(place)
        kept[key] = t
    return kept
