"""The weights of a float model, read from where it is, as the writer takes them."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from nybble.models.gguf.write import Weight
from nybble.models.sources import ModelSource


def weights_of(source: ModelSource) -> dict[str, Weight]:
    """Parameter -> weight; a tied one once, nothing is read yet."""
    return {
        name: Weight(shape=stored.shape, dtype=stored.dtype, read=partial(_read, source, name))
        for name, stored in source.stored().items()
    }


def _read(source: ModelSource, name: str) -> Tensor:
    ((_, tensor),) = source.read([name])
    return tensor
