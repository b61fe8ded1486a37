"""Which adapter a model has: its family's, fitted to where the model keeps its parts, or one made by looking at it.

What an adapter says is in :mod:`nybble.models.family`, of pairs of layers in :mod:`nybble.models.folds`. A model of an
unknown family still gets its blocks found (:func:`generic_adapter`), and says what it can't offer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from torch import nn

from nybble.core.errors import ModelError
from nybble.core.registry import Registry
from nybble.models.family import BASE as BASE
from nybble.models.family import Adapter as Adapter
from nybble.models.family import Flow as Flow
from nybble.models.family import at
from nybble.models.family import under as under
from nybble.models.folds import ROTARY_QUERY_KEY as ROTARY_QUERY_KEY
from nybble.models.folds import LinearFold as LinearFold
from nybble.models.folds import NormFold as NormFold
from nybble.models.folds import QueryKeyFold as QueryKeyFold
from nybble.models.folds import feeding_rows as feeding_rows
from nybble.models.folds import query_key_rows as query_key_rows
from nybble.nn.config import config_of
from nybble.nn.kinds import kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

REGISTRY = Registry("nybble.models.adapters", "model family", lambda part: isinstance(part, Adapter))


@cache
def _by_model_type() -> dict[str, Adapter]:
    parts: Iterable[Adapter] = REGISTRY.all().values()
    return {model_type: adapter for adapter in parts for model_type in adapter.model_types}


def checkpoint_renames(config: PreTrainedConfig) -> Mapping[str, str]:
    """Renamed parts of tensor names in this family's older checkpoints; empty for unknown families."""
    found = _by_model_type().get(config.model_type)
    return dict(found.renames) if found else {}


TEXTS = frozenset({"tokens", "sentences", "pairs"})
"""Kinds of data that are text: which of them a model reads, its class tells better than its family."""


def reads_of(model: nn.Module) -> str:
    """Key of the kind of data that a model is calibrated and judged on: its family's, and of text what its class takes.

    Text goes into a decoder with a language head as it runs, into an encoder-decoder as inputs and targets, and into
    all others (encoders, and whatever has no head or another one) as sentences.
    """
    found = _by_model_type().get(getattr(config_of(model), "model_type", ""))
    return _reads(model, "tokens" if found is None else found.reads)


def _reads(model: nn.Module, usual: str) -> str:
    main, generates = getattr(model, "main_input_name", None), getattr(model, "can_generate", None)
    if usual not in TEXTS or generates is None:
        return usual
    if main != "input_ids":
        return {"pixel_values": "images", "input_features": "speech", "input_values": "speech"}.get(str(main), usual)
    bare = getattr(model, "base_model", None) is model
    if (bare or generates()) and "decoder_input_ids" in inspect.signature(model.forward).parameters:
        return "pairs"  # with a classifier they make the decoder's inputs of the encoder's
    return "tokens" if generates() else "sentences"


def adapter_for(model: nn.Module | PreTrainedConfig) -> Adapter:
    """The adapter of a model (or of its config), or a generic one made by looking at the model.

    Raises:
        ModelError: only a config was given and its model type has no adapter; or no repeated blocks were found; or a
            convolutional network without its head.
    """
    config = config_of(model) if isinstance(model, nn.Module) else model
    found = _by_model_type().get(getattr(config, "model_type", ""))
    if found is not None and isinstance(model, nn.Module):
        fitted, reads = _fitted(found, model), _reads(model, found.reads)
        return fitted if reads == found.reads else replace(fitted, reads=reads)
    if found is not None:
        return found
    if not isinstance(model, nn.Module):
        known = ", ".join(sorted(_by_model_type()))
        raise ModelError(f"no adapter for model type {model.model_type!r}; known: {known}. Pass the model itself.")
    return generic_adapter(model)


def _fitted(adapter: Adapter, model: nn.Module) -> Adapter:
    """The adapter with its paths as this class has them (``bert.encoder.layer`` under a head)."""
    if adapter.decoder_blocks is not None and "{" not in adapter.blocks and at(model, adapter.decoder_blocks) is None:
        return replace(adapter, decoder_blocks=None)  # the encoder alone
    prefix = getattr(model, "base_model_prefix", "")
    base = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    if BASE not in adapter.blocks:
        if not base and adapter.blocks.startswith(f"{prefix}."):
            return _moved(adapter, f"{prefix}.", "")  # the bare model
        usual = f"{adapter.blocks.partition('.')[0]}."
        other = base and base != usual and at(model, adapter.blocks) is None
        return _moved(adapter, usual, base) if other else adapter  # LlamaForQuestionAnswering calls it "transformer"
    if adapter.convolutional:
        if not base:
            raise ModelError(f"{type(model).__name__} is quantized with its head: load a {adapter.name} classifier.")
        return replace(adapter, blocks=prefix)

    def fit(path: str | None) -> str | None:
        return None if path is None else path.replace(BASE, base)

    blocks, decoder = adapter.blocks.replace(BASE, base), fit(adapter.decoder_blocks)
    if decoder is not None and at(model, blocks) is None:
        blocks, decoder = decoder, None  # the decoder alone
    elif decoder is not None and at(model, decoder) is None:
        decoder = None  # the encoder alone
    return replace(
        adapter,
        blocks=blocks,
        decoder_blocks=decoder,
        embeddings=tuple(path.replace(BASE, base) for path in adapter.embeddings),
        final_norm=fit(adapter.final_norm),
    )


def _moved(adapter: Adapter, prefix: str, to: str) -> Adapter:
    """The adapter of a decoder for a class without its language head, which has the base model elsewhere."""

    def moved(path: str) -> str:
        return f"{to}{path.removeprefix(prefix)}" if path.startswith(prefix) else path

    return replace(
        adapter,
        blocks=moved(adapter.blocks),
        embeddings=tuple(map(moved, adapter.embeddings)),
        final_norm=None if adapter.final_norm is None else moved(adapter.final_norm),
        head=None,
    )


def _of_text(model: nn.Module, lists: Sequence[tuple[str, nn.Module]]) -> Sequence[tuple[str, nn.Module]]:
    """The lists in the part of a model that reads text, where there are others: a tower of images may be deeper."""
    decoder = getattr(model, "get_decoder", lambda: None)()
    parts = [name for name, module in model.named_modules() if name and module is decoder]
    parts += [name for name, _ in model.named_modules() if name.endswith(("language_model", "text_model"))]
    for part in parts:
        if inside := [item for item in lists if item[0].startswith(f"{part}.")]:
            return inside
    return lists


def _longest(lists: Sequence[tuple[str, nn.Module]]) -> str:
    """The path of the longest list of blocks of one class, else of several; of equals the one that is nested least."""
    alike = [(name, module) for name, module in lists if len({type(block) for block in module.children()}) == 1]
    return max(alike or lists, key=lambda item: (len(item[1]), -item[0].count(".")))[0]  # type: ignore[arg-type]


def _multiplies(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is not None and kind.by_rows


def generic_adapter(model: nn.Module) -> Adapter:
    """An adapter for an unknown model: its blocks are the longest list of modules with matmuls inside, alike if it can.

    Without such a list the whole model is one block. It knows no fold pairs; :attr:`Adapter.limits` says so.

    Raises:
        ModelError: nothing in the model is of a kind that can be quantized.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and not any(isinstance(block, nn.ModuleList) for block in module)
        and all(any(_multiplies(part) for part in block.modules()) for block in module)
    ]
    if not lists:
        _check_kinds(model)
        return whole_adapter(model, f"{type(model).__name__} has no list of repeated blocks")
    reads = _reads(model, "tokens")
    path, decoder = _longest(_of_text(model, lists) if reads in TEXTS else lists), None
    if reads in ("pairs", "speech"):
        sides = [[item for item in lists if side in item[0].split(".")] for side in ("encoder", "decoder")]
        if all(sides):
            path, decoder = (_longest(side) for side in sides)
    embeddings = tuple(n for n, m in model.named_modules() if isinstance(m, nn.Embedding) and not n.startswith(path))
    limits = _no_folds(f"{type(model).__name__} has no adapter")
    return Adapter(
        name="generic", model_types=(), blocks=path, embeddings=embeddings, final_norm=None,
        decoder_blocks=decoder, reads=reads, head=_head(model), limits=limits,
    )  # fmt: skip


def _check_kinds(model: nn.Module) -> None:
    """Refuse a model most of whose matrices are in layers that no kind knows: what could be quantized is the rest."""
    known, unknown, classes = 0, 0, dict[str, None]()
    for module in model.modules():
        weight, kind = module._parameters.get("weight"), kind_of(module)
        if kind is not None and kind.shares_input:
            known += sum(parameter.numel() for parameter in module.parameters(recurse=False))
        elif kind is None and weight is not None and weight.ndim > 1:
            unknown += weight.numel()
            classes[type(module).__name__] = None
    if not known or unknown > known:
        own = f"multiplies in layers of its own ({', '.join(classes)})" if classes else "has no layer that multiplies"
        raise ModelError(
            f"{type(model).__name__} {own}, and nybble knows no kind of module for that. Quantize a model of the "
            "family that it comes from, or add a kind (an entry point of the group nybble.nn.kinds)."
        )


def whole_adapter(model: nn.Module, why: str) -> Adapter:
    """An adapter under which all of a model is one block; ``why`` it can't be walked block by block, for people."""
    return Adapter(
        name="whole", model_types=(), blocks="", embeddings=(), final_norm=None, head=_head(model),
        reads=reads_of(model), limits=_no_folds(why), whole=why,
    )  # fmt: skip


def _head(model: nn.Module) -> str | None:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return None if head is None else next((n for n, m in model.named_modules() if m is head), None)


def _no_folds(why: str) -> tuple[str, ...]:
    return (
        f"transforms that fold a norm into linears (SmoothQuant, ...) are off: {why}",
        f"transforms that fold a linear into a linear (equalisation, ...) are off: {why}",
    )
