"""Where a model's layers stand in a compressed-tensors checkpoint, and under which scheme."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.tensorfile import Planned
from nybble.export import Refusal
from nybble.export._ct_config import form_of
from nybble.export._ct_tensors import Matrix, shared_divisor
from nybble.export._fused import fused_groups
from nybble.export._modules import check_apart, check_module
from nybble.export._names import Part, parts_of
from nybble.export._source import Layer, Source
from nybble.models.sources.layouts._ct_args import (
    E2M1,
    Args,
    CannotError,
    above,
    activation_args,
    is_nvfp4,
    weight_args,
)
from nybble.nn.embedding import input_embedding
from nybble.nn.kinds import Kind
from nybble.qtensor import Inverse
from nybble.qtensor.block import BlockQTensor


@dataclass(frozen=True)
class Placed:
    """A module of the checkpoint.

    Attributes:
        name: of it there. at: the module's name in the model; empty for one of fused experts. layer: what it is of.
        scheme: weights, input_activations and output_activations, as arguments; and the ``format``.
        matrix: what its weight is; None where that stays in float.
        untied: whether it is a head that read the embedding's table, and gets a copy.
        embedding: whether it is a table. head: whether it is what gives logits.
    """

    name: str
    at: str
    layer: Layer
    scheme: dict[str, Any]
    matrix: Matrix | None
    untied: bool = False
    embedding: bool = False
    head: bool = False

    def tensors(self, source: Source) -> dict[str, Planned]:
        """What is written, by full name."""
        found = {} if self.matrix is None else self.matrix.tensors()
        for side, word in (("inputs", "input"), ("outputs", "output")):
            filled = source.activation(self.layer, side)
            if filled is None or not filled.quantizer.static or self.untied:
                continue
            parts = filled.state_dict()
            if "divisor" in parts:
                found[f"{word}_global_scale"] = _kept(parts["divisor"].float().reshape(1))
                continue
            found[f"{word}_scale"] = _kept(parts["scale"].float().reshape(1))
            if "zero_point" in parts:
                zero_point = parts["zero_point"] - above(filled.quantizer.format)
                found[f"{word}_zero_point"] = _kept(zero_point.round().to(torch.int8).reshape(1))
        return {f"{self.name}.{name}": plan for name, plan in found.items()}


def _kept(tensor: Tensor) -> Planned:
    dtype = "F32" if tensor.dtype == torch.float32 else "I8"
    return Planned(dtype=dtype, shape=tuple(tensor.shape), bytes_from=lambda: tensor)


def scheme_of(source: Source, model: nn.Module, layer: Layer) -> dict[str, Any]:
    """The scheme of a layer: arguments by side, and the format of its files.

    Raises:
        CannotError: compressed-tensors has none.
    """
    key = ("scheme", layer.name)
    if key not in source.known:
        source.known[key] = _scheme_of(source, model, layer)
    found: dict[str, Any] = source.known[key]
    return found


def _scheme_of(source: Source, model: nn.Module, layer: Layer) -> dict[str, Any]:
    _check_kind(model, layer, layer.kind)
    if layer.kind.reads_another:
        layer = table_of(source, model, layer)
    found: dict[str, Any] = {}
    for weight in layer.weights.values():
        args = weight_args(weight)
        if found.setdefault("weights", args) != args:
            raise CannotError("experts in different formats", "one format for all experts of a layer")
    if "weights" in found and layer.kind.fused:
        _check_parts(source, model, layer, found["weights"])
    for side, word in (("inputs", "input_activations"), ("outputs", "output_activations")):
        quantizer = getattr(layer, side)
        if quantizer is not None:
            found[word] = activation_args(quantizer.quantizer)
    return {**found, "format": form_of(found)}


def _check_kind(model: nn.Module, layer: Layer, kind: Kind) -> None:
    if kind.reads_another:
        module = model.get_submodule(layer.name)
        if isinstance(module, nn.Embedding):
            raise CannotError("an embedding that shares another's table", "embeddings in float", "it has no ties")
        return
    if kind.fused:
        return
    if kind.operands:
        raise CannotError("the operands of attention", "--matmuls left out")
    check_module(model.get_submodule(layer.name))


def table_of(source: Source, model: nn.Module, head: Layer) -> Layer:
    """The embedding whose table a head reads."""
    named = str(head.entry.get("table", ""))
    table = input_embedding(model)
    name = named or next(name for name, module in model.named_modules() if module is table)
    return source.layers[name]


def placed(source: Source, model: Any) -> list[Placed]:
    """All quantized modules of the checkpoint.

    Raises:
        CannotError: one that compressed-tensors has no words for; :meth:`check` said so.
    """
    found: list[Placed] = []
    divisors = {name: divisor for group, divisor in nvfp4_groups(source, model) for name in group}
    for layer in source.layers.values():
        scheme = scheme_of(source, model, layer)
        untied = layer.kind.reads_another
        read = table_of(source, model, layer) if untied else layer
        module = None if layer.kind.fused else model.get_submodule(layer.name)
        table, head = isinstance(module, nn.Embedding), module is not None and module is model.get_output_embeddings()
        if not read.weights:
            found.append(Placed(layer.name, layer.name, layer, scheme, None, head=head))
        for name, prefix, rows in stored_under(source, model, layer, read):
            matrix = Matrix(source, read, prefix, rows, scheme["weights"], scheme["format"], divisors.get(layer.name))
            at = "" if layer.kind.fused else layer.name
            found.append(Placed(name, at, layer, scheme, matrix, untied, table, head))
    return found


def nvfp4_groups(source: Source, model: Any) -> list[tuple[tuple[str, ...], float | None]]:
    """Names of layers that runtimes join, all in NVFP4; and the divisor that they can share, None where they can't."""
    found = []
    for group in fused_groups(source.layers):
        layers = [source.layers[name] for name in group]
        weights = [weight for layer in layers for weight in layer.weights.values()]
        if weights and all(isinstance(w, BlockQTensor) and w.format.name == E2M1 and is_nvfp4(w) for w in weights):
            found.append((group, shared_divisor(source, layers)))
    return found


def unequal_inputs(source: Source) -> list[Refusal]:
    """Layers that runtimes join, whose NVFP4 inputs are under different calibrated numbers."""
    why, came = "runtimes join them into one layer, which has one input", "different global scales of inputs"
    nearest = "one calibrated global scale for all of them"
    groups = fused_groups(source.layers)
    bad = [group for group in groups if len({_input_divisor(source, name) for name in group}) > 1]
    return [Refusal(layers=group, came=came, nearest=nearest, why=why) for group in bad]


def _input_divisor(source: Source, name: str) -> float | None:
    filled = source.activation(source.layers[name], "inputs")
    params = None if filled is None else filled.params()
    return params.scale.divisor.item() if params is not None and isinstance(params.scale, Inverse) else None


def stored_under(
    source: Source, model: Any, layer: Layer, read: Layer
) -> Iterator[tuple[str, str, tuple[int, ...] | None]]:
    """Name in the checkpoint, prefix of the stored matrix, its rows (None: all)."""
    prefixes = list(read.weights)
    if not prefixes:
        return
    rows = read.weights[prefixes[0]].shape[0]
    for part in _parts(model, layer, len(prefixes) if layer.kind.fused else 0, rows):
        yield part.name.removesuffix(".weight"), prefixes[part.matrix], part.rows


def _parts(model: Any, layer: Layer, matrices: int, rows: int) -> list[Part]:
    name = layer.name if layer.kind.fused else f"{layer.name}.weight"
    return parts_of(model, name, matrices, rows, bool(layer.entry.get("transposed", False)))


def _check_parts(source: Source, model: Any, layer: Layer, args: Args) -> None:
    """Whether a checkpoint has experts apart, as compressed-tensors does, and their rows can be cut there."""
    from nybble.core.errors import GranularityError
    from nybble.qtensor._rows import take_rows

    weight = next(iter(layer.weights.values()))
    check_apart(model, layer.name, len(layer.weights), weight.shape[0], bool(layer.entry.get("transposed", False)))
    for part in _parts(model, layer, len(layer.weights), weight.shape[0]):
        if part.matrix == 0 and part.rows is not None and args["strategy"] == "block":
            try:
                real = type(weight).rebuild(weight.spec(), {k: _zeros(t) for k, t in weight.tensors().items()})
                take_rows(real, part.rows)
            except GranularityError as error:
                raise CannotError(str(weight.spec()["granularity"]), "group=128", str(error)) from error


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype)
