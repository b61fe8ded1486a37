"""A model whose weights stay packed as another library's files have them: whole, or a block at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nybble.core.errors import FileError, ModelError, NybbleError, within
from nybble.models.build.skeleton import kept_float32, unsaved
from nybble.models.sources.folder import FolderSource
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.kinds import Quantized, Target, prepare_quantized, targets_of
from nybble.nn.kv_model import KVRecord, from_json, use_quantized_cache
from nybble.nn.packed import validate_packed
from nybble.qtensor import QTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def packed_model(source: FolderSource, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder with QTensors where the files have packed weights, in eval mode, on the CPU.

    A packed weight that no kind of module can hold (one that is tied to another, say) is dequantized. Inputs, outputs
    and the KV cache are rounded as the files ask, where nybble can; a warning says what it can't.

    Args:
        source: with :attr:`~nybble.models.sources.folder.FolderSource.packed` weights.
        dtype: of what is in float.

    Raises:
        ModelError: tensors that don't fit the model. FileError: damaged ones.
    """
    filling = _Filling(source, dtype)
    filling.fill(lambda name: True)
    model = filling.model
    prepare_quantized(model)
    with _told_of(source):
        use_quantized_cache(model, cache_of(source))
    filling.say()
    model.tie_weights()
    nn.Module.eval(model)
    return model


def packed_blocks(source: FolderSource, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """The same model, of which one block at a time is in memory; behind the last one what is in none.

    Args:
        source: as for :func:`packed_model`.
        dtype: of what is in float.

    Yields:
        a block's name with a dot, and its module; at last "" and the model, whose blocks are gone.

    Raises:
        ModelError, FileError: as :func:`packed_model`.
    """
    filling = _Filling(source, dtype)
    blocks = _blocks(filling.model)
    ties = source.ties()
    if any(name.startswith(tuple(blocks)) for tie in ties.items() for name in tie):
        blocks = []  # a block that shares with another can't be let go before it
    for block in blocks:
        filling.fill(lambda name, block=block: name.startswith(block))  # type: ignore[misc]
        name = block.removesuffix(".")
        yield block, filling.model.get_submodule(name)
        filling.model.set_submodule(name, nn.Module())  # what it held goes with it
    done = tuple(blocks)
    filling.fill(lambda name: not name.startswith(done) if done else True)
    filling.say()
    filling.model.tie_weights()
    nn.Module.eval(filling.model)
    yield "", filling.model


def cache_of(source: FolderSource) -> KVRecord | None:
    """What the files ask the KV cache to be in, where nybble can."""
    return from_json(source.rounded.kv or None)


class _Filling:
    """A skeleton on its way to a model."""

    def __init__(self, source: FolderSource, dtype: torch.dtype) -> None:
        self.source, self.dtype = source, dtype
        self.model = source.skeleton(dtype)
        self.expected, self.kept = set(self.model.state_dict()), kept_float32(self.model)
        self.rounds = 0

    def fill(self, wanted: Callable[[str], bool]) -> None:
        """Give the parameters with the names that are wanted what the files have."""
        source, model = self.source, self.model
        ties = source.ties()
        held = self._put(wanted)
        names = [name for name in (*source.tensor_names(), *ties) if name not in held and wanted(name)]
        tensors = source.load(names, dtype=self.dtype, kept=self.kept)
        unfit = model.load_state_dict(tensors, strict=False, assign=True)
        computed = unsaved(model)
        missing = [name for name in unfit.missing_keys if name in self.expected and wanted(name)]
        absent = [name for name in missing if name not in ties and name not in computed]
        if absent or unfit.unexpected_keys:
            raise ModelError(f"{source.spec}: tensors don't fit the model: {(absent + unfit.unexpected_keys)[:5]}.")
        with _told_of(source):
            validate_packed(model)

    def _put(self, wanted: Callable[[str], bool]) -> set[str]:
        """Packed modules in place of float ones; the parameters that they hold."""
        waiting, ties = self.source.packed_names(), self.source.ties()
        shared = {*ties, *ties.values()}
        held: set[str] = set()
        for target in targets_of(self.model).values():
            names = [name for name in target.parameters if name in waiting and wanted(name)]
            if len(names) != 1 or names != list(target.parameters) or shared & set(names):
                continue
            found = self.source.read_packed(names[0])
            if _fits(target, found):
                sides = _sides(self.source, target, names[0])
                self.rounds += len(sides)
                made = Quantized(weights=found, inputs=sides.get("inputs"), outputs=sides.get("outputs"))
                target.kind.put(self.model, target, made)
                held.add(names[0])
        return held

    def say(self) -> None:
        """Warn of what the files ask to be rounded and isn't."""
        rounded = self.source.rounded
        asked = len(rounded.inputs) + len(rounded.outputs)
        lost = f"{asked - self.rounds} layers that take no quantizer of activations (experts, say) run in float."
        if rounded.left or self.rounds < asked:
            warnings.warn(f"{self.source.spec}: {rounded.left or lost}", stacklevel=4)


class _told_of:  # noqa: N801
    """Errors of nybble's own become the file's, with the model's name before them."""

    def __init__(self, source: FolderSource) -> None:
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, NybbleError):
            raise FileError(f"{self.source.spec}: {error}") from error


def _blocks(model: nn.Module) -> list[str]:
    """Names, with a dot, of the modules in lists that are in no other list."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(found)):
            found += [f"{name}.{number}." for number in range(len(module))]
    return found


def _sides(source: FolderSource, target: Target, name: str) -> dict[str, ActivationQuantizer]:
    """What is rounded on the way in and out of a module, where its kind can."""
    found = {side: source.activations(name, side) for side in ("inputs", "outputs") if side in target.kind.sides}
    columns = {"inputs": target.shape[1], "outputs": target.shape[0]}
    for side, quantizer in found.items():
        if quantizer is not None:
            with within(f"{source.spec}: {side} of {name}"):
                quantizer.quantizer.granularity.check((1, columns[side]))
    return {side: quantizer for side, quantizer in found.items() if quantizer is not None}


def _fits(target: Target, found: Sequence[QTensor]) -> bool:
    return len(found) == target.matrices and all(tuple(part.shape) == target.shape for part in found)
