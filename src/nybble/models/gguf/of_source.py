"""The weights of a model, read from where it is, as the writer takes them."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from nybble.models.gguf.write import Weight
from nybble.models.sources import ModelSource
from nybble.models.sources.gguf_file import GgufSource
from nybble.qtensor import QTensor


def weights_of(source: ModelSource) -> dict[str, Weight]:
    """Parameter -> weight; a tied one once, nothing is read yet. What a GGUF has quantized keeps its codes."""
    return {
        name: Weight(
            shape=stored.shape,
            dtype=stored.dtype,
            read=partial(_read, source, name),
            stored=source.described(name) if isinstance(source, GgufSource) else None,
        )
        for name, stored in source.stored().items()
    }


def _read(source: ModelSource, name: str) -> Tensor | QTensor:
    found = source.read_quantized(name) if isinstance(source, GgufSource) else None
    if found is not None:
        return found
    ((_, tensor),) = source.read([name])
    return tensor
