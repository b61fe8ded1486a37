"""The weights of a model, read from where it is, as the writer takes them."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from nybble.models.gguf.write import Weight
from nybble.models.sources import ModelSource
from nybble.models.sources.gguf_file import GgufSource
from nybble.qtensor import QTensor


def weights_of(source: ModelSource, *, codes: bool = True) -> dict[str, Weight]:
    """Parameter -> weight; a tied one once, nothing is read yet.

    Args:
        source: of the model.
        codes: give what a GGUF has quantized with the codes that it has, so that nothing is rounded; else its values.
    """
    return {
        name: Weight(
            shape=stored.shape,
            dtype=stored.dtype,
            read=partial(_read, source, name, codes),
            stored=source.described(name) if codes and isinstance(source, GgufSource) else None,
            blocks=partial(source.blocks_at, name) if codes and isinstance(source, GgufSource) else None,
        )
        for name, stored in source.stored().items()
    }


def _read(source: ModelSource, name: str, codes: bool) -> Tensor | QTensor:
    found = source.read_quantized(name) if codes and isinstance(source, GgufSource) else None
    if found is not None:
        return found
    ((_, tensor),) = source.read([name])
    return tensor
