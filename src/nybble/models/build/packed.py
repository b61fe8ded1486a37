"""A model whose weights stay packed as another library's files have them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from nybble.core.errors import FileError, ModelError, NybbleError, SchemeError, within
from nybble.models.build.skeleton import kept_float32, unsaved
from nybble.models.sources import ModelSource
from nybble.models.sources.folder import FolderSource
from nybble.models.sources.layouts._rounded import ONE
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.kinds import Quantized, Target, kind_of, prepare_quantized, targets_of
from nybble.nn.kv_model import KVRecord, cached_attentions, check_cache, from_json, use_quantized_cache
from nybble.nn.packed import validate_packed
from nybble.nn.rotation import mark_rotated
from nybble.qtensor import QTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def packed_model(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    """A model with QTensors where its files have packed weights, in eval mode, on the CPU.

    A packed weight that no kind of module can hold is dequantized; a table stays one with the head that reads it.
    Inputs, outputs and the KV cache are rounded as the files ask, where nybble can; a warning says what it can't.

    Args:
        source: with packed weights.
        dtype: of what is in float.

    Raises:
        ModelError: tensors that don't fit the model. FileError: damaged ones.
    """
    model = source.skeleton(dtype)
    expected, computed, kept = set(model.state_dict()), unsaved(model), kept_float32(model)
    ties = source.ties()
    held, rounds = _put(source, model)
    names = [name for name in (*source.tensor_names(), *ties) if name not in held]
    unfit = model.load_state_dict(source.load(names, dtype=dtype, kept=kept), strict=False, assign=True)
    absent = [n for n in unfit.missing_keys if n in expected and n not in ties and n not in computed]
    if absent or unfit.unexpected_keys:
        raise ModelError(f"{source.spec}: tensors don't fit the model: {(absent + unfit.unexpected_keys)[:5]}.")
    prepare_quantized(model)
    with _told_of(source):
        validate_packed(model)
    use_quantized_cache(model, cache_of(source, model))
    left = (source.rounded.left or lost_sides(source, rounds)) if isinstance(source, FolderSource) else ""
    if left:
        warnings.warn(f"{source.spec}: {left}", stacklevel=3)
    model.tie_weights()
    nn.Module.eval(model)
    return model


def cache_of(source: ModelSource, model: nn.Module) -> KVRecord | None:
    """What the files ask the KV cache of their model to be in, where nybble can.

    Raises:
        FileError: that model has no such cache.
    """
    if not isinstance(source, FolderSource):
        return None
    with _told_of(source):
        asked = source.rounded.kv
        found = from_json((asked if isinstance(asked, str) else _by_attention(asked, model)) or None)
        if found is not None:
            check_cache(model, found)
    return found


def _by_attention(lines: Mapping[str, str], model: nn.Module) -> dict[str, str]:
    """Lines of attentions as the files call them, by their names in the model; others cache without a scale."""
    found = dict.fromkeys(cached_attentions(model), ONE)
    for name, line in lines.items():
        places = [n for n in found if n == name or n.endswith(f".{name}") or name.endswith(f".{n}")]
        if len(places) != 1:
            raise FileError(f"{name} has scales of a KV cache, and is no attention of this model that caches.")
        found[places[0]] = line
    return found


def sides_of(source: ModelSource, target: Target, name: str) -> dict[str, ActivationQuantizer]:
    """What is rounded on the way in and out of a module, where its kind can.

    Args:
        source: of the model.
        target: the module.
        name: of its packed weight.

    Raises:
        FileError: numbers that can't be meant. GranularityError: groups that don't divide what passes.
    """
    if not isinstance(source, FolderSource):
        return {}
    asked = {side: source.activations(name, side) for side in ("inputs", "outputs") if side in target.kind.sides}
    found: dict[str, ActivationQuantizer] = {side: q for side, q in asked.items() if q is not None}
    columns = {"inputs": target.shape[1], "outputs": target.shape[0]}
    for side, quantizer in found.items():
        with within(f"{source.spec}: {side} of {name}"):
            quantizer.quantizer.granularity.check((1, columns[side]))
    return found


def rotated(source: ModelSource, target: Target, model: nn.Module, name: str) -> Target:
    """The target, behind the rotation of its input that the files ask for, if they do.

    Args:
        source: of the model.
        target: a module of ``model``, which is marked.
        model: in float.
        name: of its packed weight.

    Raises:
        ModelError: no linear layer. FileError: the rotation can't be meant.
    """
    rotation = source.rotation(name) if isinstance(source, FolderSource) else None
    if rotation is None:
        return target
    module = model.get_submodule(target.module)
    if target.kind.entry != "linear":
        raise ModelError(f"{source.spec} rotates the input of {target.name}, a {type(module).__name__}.")
    mark_rotated(module, rotation)
    kind = kind_of(module)
    assert kind is not None
    return replace(target, kind=kind)


def lost_sides(source: FolderSource, rounds: int) -> str:
    """A line on what the files ask to be rounded, nybble can, and no layer took; ``rounds``: how many were taken."""
    lost = len(source.rounded.inputs) + len(source.rounded.outputs) - rounds
    return f"{lost} layers that take no quantizer of activations (experts, say) run in float." if lost > 0 else ""


def shared_by(target: Target, model: nn.Module, name: str, ties: Mapping[str, str]) -> Target | None:
    """A target with all that read its parameter; None where that can't be packed, or follows another.

    Args:
        target: that alone.
        model: with it.
        name: of its parameter.
        ties: name -> the name that it is tied to.
    """
    kept = ties.get(name, name)
    others = [other for other in (kept, *(tied for tied, to in ties.items() if to == kept)) if other != name]
    try:
        return target.kind.tied(target, model, others) if others else target
    except SchemeError:
        return None


def fits(target: Target, found: Sequence[QTensor]) -> bool:
    """Whether these are all of a target's matrices."""
    return len(found) == target.matrices and all(tuple(part.shape) == target.shape for part in found)


def _put(source: ModelSource, model: nn.Module) -> tuple[set[str], int]:
    """Packed modules in place of float ones; the parameters that they hold, and how many round what passes."""
    waiting, ties = source.packed_names(), source.ties()
    held: set[str] = set()
    rounds = 0
    for target in targets_of(model).values():
        names = [name for name in target.parameters if name in waiting]
        if len(names) != 1 or names != list(target.parameters):
            continue
        shared = shared_by(target, model, names[0], ties)
        if shared is None:
            continue
        found = source.read_packed(names[0])
        if fits(target, found):
            sides = sides_of(source, target, names[0])
            rounds += len(sides)
            made = Quantized(weights=found, inputs=sides.get("inputs"), outputs=sides.get("outputs"))
            shared = rotated(source, shared, model, names[0])
            shared.kind.put(model, shared, made)
            kept = ties.get(names[0], names[0])
            held |= {names[0], kept, *(tied for tied, to in ties.items() if to == kept)}
    return held, rounds


@contextmanager
def _told_of(source: ModelSource) -> Iterator[None]:
    """Errors of nybble's own become the file's, with the model's name before them."""
    try:
        yield
    except NybbleError as error:
        raise FileError(f"{source.spec}: {error}") from error
