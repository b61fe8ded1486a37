"""A model whose weights stay packed as another library's files have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from nybble.core.errors import FileError, ModelError, SchemeError
from nybble.models.build.skeleton import kept_float32, unsaved
from nybble.models.sources.folder import FolderSource
from nybble.nn.kinds import Quantized, Target, prepare_quantized, targets_of
from nybble.nn.packed import validate_packed
from nybble.qtensor import QTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def packed_model(source: FolderSource, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder with QTensors where the files have packed weights, in eval mode, on the CPU.

    A packed weight that no kind of module can hold is dequantized; a table stays one with the head that reads it.

    Args:
        source: with :attr:`~nybble.models.sources.folder.FolderSource.packed` weights.
        dtype: of what is in float.

    Raises:
        ModelError: tensors that don't fit the model. FileError: damaged ones.
    """
    model = source.skeleton(dtype)
    expected, computed, kept = set(model.state_dict()), unsaved(model), kept_float32(model)
    waiting, ties = source.packed_names(), source.ties()
    held: set[str] = set()
    for target in targets_of(model).values():
        names = [name for name in target.parameters if name in waiting]
        if len(names) != 1 or names != list(target.parameters):
            continue
        others = _tied_to(names[0], ties)
        shared = _sharing(target, model, others) if others else target
        if shared is None:
            continue
        found = source.read_packed(names[0])
        if _fits(target, found):
            target.kind.put(model, shared, Quantized(weights=found))
            held |= {names[0], *others}
    names = [name for name in (*source.tensor_names(), *ties) if name not in held]
    unfit = model.load_state_dict(source.load(names, dtype=dtype, kept=kept), strict=False, assign=True)
    absent = [n for n in unfit.missing_keys if n in expected and n not in ties and n not in computed]
    if absent or unfit.unexpected_keys:
        raise ModelError(f"{source.spec}: tensors don't fit the model: {(absent + unfit.unexpected_keys)[:5]}.")
    prepare_quantized(model)
    try:
        validate_packed(model)
    except FileError as error:
        raise FileError(f"{source.spec}: {error}") from error
    model.tie_weights()
    nn.Module.eval(model)
    return model


def _tied_to(name: str, ties: Mapping[str, str]) -> list[str]:
    """Full names of the other parameters that share a tensor."""
    kept = ties.get(name, name)
    return [other for other in (kept, *(tied for tied, to in ties.items() if to == kept)) if other != name]


def _sharing(target: Target, model: nn.Module, others: Sequence[str]) -> Target | None:
    """A table with the head and the embeddings that read it; None where no kind of module can be shared so."""
    try:
        return target.kind.tied(target, model, others)
    except SchemeError:
        return None


def _fits(target: Target, found: Sequence[QTensor]) -> bool:
    return len(found) == target.matrices and all(tuple(part.shape) == target.shape for part in found)
