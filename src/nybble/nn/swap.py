"""Putting quantized modules where float ones stood, from live modules or from a checkpoint's description."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import FileError, ModelError
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.attention import PART, MatmulQuantizers, use_quantized_attention
from nybble.nn.batchnorm import foldable, remainder
from nybble.nn.conv import Geometry, QuantConv, is_conv
from nybble.nn.embedding import QuantEmbedding, TiedHead
from nybble.nn.experts import PackedExperts
from nybble.nn.linear import QuantLinear
from nybble.nn.packed import Packed
from nybble.qtensor import QTensor, from_spec


def matrix_of(module: nn.Module) -> Tensor | None:
    """The weight of a module as [out, in] (a view): of ``nn.Linear``, GPT-2's ``Conv1D``, convolutions; else None.

    A convolution's is [out, in / groups * kernel].
    """
    weight = getattr(module, "weight", None)
    return as_matrix(module, weight) if isinstance(weight, Tensor) else None


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor | None:
    """:func:`matrix_of` for another tensor in the place of the module's weight."""
    if is_conv(module):
        return weight.flatten(1)
    if isinstance(module, nn.Linear):
        return weight
    return weight.T if type(module).__name__ == "Conv1D" else None


def is_linear(module: nn.Module) -> bool:
    """Whether :func:`matrix_of` finds a matrix, and the module multiplies rows by it."""
    return matrix_of(module) is not None and not is_conv(module)


def class_names(module: nn.Module) -> tuple[str, ...]:
    """The names that a scheme's target may use: the class, and its kind: ``Linear``, ``Embedding`` or ``Conv``."""
    own = type(module).__name__
    if is_conv(module):
        return own, "Conv"
    if isinstance(module, nn.Embedding) and own != "Embedding":
        return own, "Embedding"
    return (own, "Linear") if is_linear(module) and own != "Linear" else (own,)


def set_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at ``name``."""
    parent, _, leaf = name.rpartition(".")
    root.get_submodule(parent).add_module(leaf, module)


def quantized(
    old: nn.Module,
    weight: QTensor | Tensor,
    bias: Tensor | None,
    inputs: ActivationQuantizer | None,
    outputs: ActivationQuantizer | None,
    folded: str = "",
) -> QuantLinear | QuantConv:
    """What stands for a linear layer or a convolution; ``weight`` as :func:`matrix_of` gives it."""
    if is_conv(old):
        return QuantConv(weight, bias, Geometry.of(old), inputs, outputs, folded)
    return QuantLinear(weight, bias, inputs, outputs)


def drop_norm(root: nn.Module, name: str) -> None:
    """Take out a BatchNorm that was folded; its activation stays.

    Raises:
        ModelError: there is none.
    """
    try:
        norm = root.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"the model has no BatchNorm called {name!r}.") from error
    if not foldable(norm):
        raise ModelError(f"{name} is a {type(norm).__name__}, which can't have been folded.")
    set_module(root, name, remainder(norm))


QuantModule = QuantLinear | QuantConv | PackedExperts | MatmulQuantizers | QuantEmbedding | TiedHead


def quant_modules(root: nn.Module) -> Iterator[tuple[str, QuantModule]]:
    """All quantized modules with their names."""
    for name, module in root.named_modules():
        if isinstance(module, QuantModule):
            yield name, module


def hold_dense(root: nn.Module, dtype: torch.dtype | None) -> None:
    """Keep (or with None, drop) dequantized copies of all packed weights: speed for memory, the same numbers."""
    for module in root.modules():
        if isinstance(module, Packed):
            module.hold(dtype)


def use_eager_experts(model: nn.Module) -> None:
    """Let mixture-of-experts layers take their matrices one expert at a time, as packed experts give them."""
    config: Any = model.config
    for part in (config, config.get_text_config()):
        part._experts_implementation = "eager"


def prepare_quantized(model: nn.Module) -> None:
    """Let a model call its quantized parts: experts one at a time, attention with rounded operands."""
    parts = list(model.modules())
    if any(isinstance(part, PackedExperts) for part in parts):
        use_eager_experts(model)
    if any(isinstance(part, MatmulQuantizers) for part in parts):
        use_quantized_attention(model)


FORMAT_VERSION = 1


def check_version(quantization: Mapping[str, Any]) -> None:
    """Raise FileError unless this nybble reads the format version of a ``quantization_config`` and it has its parts."""
    version = quantization.get("format_version", FORMAT_VERSION)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise FileError(
            f"the file has nybble format version {version!r:.80}; this nybble reads up to {FORMAT_VERSION}. "
            "Update nybble."
        )
    if not isinstance(quantization.get("modules"), dict) or not isinstance(quantization.get("layouts"), list):
        raise FileError("quantization_config lacks 'modules' or 'layouts': this is not a checkpoint that nybble wrote.")


class Layouts:
    """The distinct QTensor layouts of a checkpoint: spec, dtypes and shapes; modules name them by number."""

    def __init__(self, entries: list[dict[str, Any]] | None = None) -> None:
        self.entries: list[dict[str, Any]] = entries or []

    def number(self, qtensor: QTensor) -> int:
        """The number of this tensor's layout, added if it is new."""
        tensors = {n: [str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in qtensor.tensors().items()}
        return self.add({"spec": qtensor.spec(), "tensors": tensors})

    def add(self, entry: dict[str, Any]) -> int:
        """The number of an entry, appended if it is new."""
        if entry not in self.entries:
            self.entries.append(entry)
        return self.entries.index(entry)

    def empty(self, number: int) -> QTensor:
        """A QTensor of this layout on the current default device, its tensors to be filled."""
        entry = self.entries[number]
        tensors: dict[str, Tensor] = {}
        for name, (dtype, shape) in entry["tensors"].items():
            tensors[name] = torch.empty(shape, dtype=_dtype(dtype))
        return from_spec(entry["spec"], tensors)


def _dtype(name: object) -> torch.dtype:
    kind = getattr(torch, str(name), None)
    if not isinstance(kind, torch.dtype):
        raise FileError(f"unknown dtype {name!r} in the description of a quantized tensor.")
    return kind


def put_embedding(root: nn.Module, name: str, table: QTensor, dtype: torch.dtype) -> QuantEmbedding:
    """Replace an embedding by a quantized one.

    Raises:
        ModelError: there is no plain embedding of this shape.
    """
    old = root.get_submodule(name)
    if type(old) is not nn.Embedding or tuple(old.weight.shape) != tuple(table.shape):
        raise ModelError(f"{name} is a {type(old).__name__}, not a plain embedding of shape {list(table.shape)}.")
    found = QuantEmbedding(table, dtype, old.padding_idx)
    set_module(root, name, found)
    return found


def tie_head(root: nn.Module, name: str) -> None:
    """Replace an output head by one that reads the (quantized) input embedding's table.

    Raises:
        ModelError: the input embedding isn't quantized, or is of another shape.
    """
    model: Any = root
    embedding, head = model.get_input_embeddings(), root.get_submodule(name)
    if not isinstance(embedding, QuantEmbedding):
        raise ModelError(f"{name} is tied to the input embedding, which is not quantized.")
    matrix = matrix_of(head)
    if matrix is None or tuple(matrix.shape) != (embedding.num_embeddings, embedding.embedding_dim):
        raise ModelError(f"{name} is no head over the {embedding.num_embeddings} tokens of the input embedding.")
    bias = head.bias.detach() if isinstance(head.bias, Tensor) else None
    set_module(root, name, TiedHead(embedding, bias))
    model.config.get_text_config().tie_word_embeddings = False  # nothing is left for transformers to tie
    model.config.tie_word_embeddings = False


def describe(module: QuantModule, layouts: Layouts) -> dict[str, Any]:
    """How to rebuild the module empty: the entry of a checkpoint's ``modules``."""
    if isinstance(module, PackedExperts):
        numbers = [layouts.number(p.qtensor()) for p in module.experts if isinstance(p, Packed)]
        return {"class": "experts", "weights": numbers, "transposed": module.transposed}
    if isinstance(module, QuantEmbedding):
        number = layouts.number(module.weight.qtensor())
        return {"class": "embedding", "weight": number, "dtype": str(module.dtype).removeprefix("torch.")}
    if isinstance(module, TiedHead):
        return {"class": "tied"}
    if isinstance(module, MatmulQuantizers):
        return {"class": "matmuls", "operands": module.to_dict()}
    found: dict[str, Any] = {"class": "linear"}
    if isinstance(module, QuantConv):
        found = {"class": "conv", "bias": module.bias is not None}
        if module.folded:
            found["folded"] = module.folded
    if isinstance(module.weight, Packed):
        found["weight"] = layouts.number(module.weight.qtensor())
    for side in ("inputs", "outputs"):
        quantizer = getattr(module, side)
        if quantizer is not None:
            found[side] = quantizer.to_dict()
    return found


def put_described(root: nn.Module, name: str, entry: Any, layouts: Layouts) -> None:
    """Replace the float module (or fused parameter) at ``name`` by the empty quantized one that ``entry`` describes.

    ``entry`` is what :func:`describe` gave, read from a file that may say anything.

    Raises:
        FileError: the entry is malformed. ModelError: the model has no such module.
    """
    inside = isinstance(entry, dict) and entry.get("class") in ("experts", "matmuls")
    try:
        old = root.get_submodule(name.rpartition(".")[0] if inside else name)
    except AttributeError as error:
        raise ModelError(f"the checkpoint quantizes {name}, which this model does not have.") from error
    try:
        if entry["class"] == "embedding":
            put_embedding(root, name, layouts.empty(int(entry["weight"])), _dtype(entry["dtype"]))
            return
        if entry["class"] == "tied":
            tie_head(root, name)
            return
        if entry["class"] == "matmuls":
            if not name.endswith(f".{PART}"):
                raise FileError(f"{name} is described as an attention's {PART}, which has another name.")
            old.add_module(PART, MatmulQuantizers.from_dict(entry["operands"]))
            return
        if entry["class"] == "experts":
            leaf = name.rpartition(".")[2]
            dtype = getattr(old, leaf).dtype
            del old._parameters[leaf]
            old.add_module(
                leaf,
                PackedExperts(
                    [layouts.empty(int(n)) for n in entry["weights"]], dtype, transposed=bool(entry["transposed"])
                ),
            )
            return
        if entry["class"] not in ("linear", "conv"):
            raise FileError(f"{name} is described as a {entry['class']!r:.80}, which this nybble does not know.")
        matrix = matrix_of(old)
        if matrix is None:
            raise ModelError(
                f"the checkpoint quantizes {name}, in this model a {type(old).__name__} and not a layer with a matrix."
            )
        sides = {s: ActivationQuantizer.from_dict(entry[s]) if s in entry else None for s in ("inputs", "outputs")}
        weight = layouts.empty(int(entry["weight"])) if "weight" in entry else matrix.detach()
        if tuple(weight.shape) != tuple(matrix.shape):
            raise FileError(f"{name} is described as {list(weight.shape)}; this model has {list(matrix.shape)}.")
        bias = old.bias if isinstance(old.bias, Tensor) else None
        folded = str(entry.get("folded", ""))
        if (entry["class"] == "conv") != is_conv(old):
            raise FileError(f"{name} is described as a {entry['class']}; in this model it is a {type(old).__name__}.")
        if entry["class"] == "conv":
            dtype = matrix.dtype
            bias = torch.empty(len(matrix), dtype=dtype, device=matrix.device) if entry["bias"] else None
            if folded:
                drop_norm(root, folded)
        set_module(root, name, quantized(old, weight, bias, sides["inputs"], sides["outputs"], folded))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise FileError(f"malformed description of {name} ({type(error).__name__}: {error}).") from error
