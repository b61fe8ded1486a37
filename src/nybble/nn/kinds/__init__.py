"""Kinds of modules: what a linear layer, a convolution, an embedding, fused experts, an attention is. One kind a file.

A file defines ``PART``, a :class:`Kind` (a layer with one matrix is a ``LayerKind``): which float modules are of it,
which way round their matrix is, what calibration must see of them, what stands for them when they are quantized, how a
checkpoint describes that and puts it back. Nothing else in nybble asks what class a module is. Other packages add kinds
through entry points of the group ``nybble.nn.kinds``; theirs are asked first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from nybble.core.errors import FileError, ModelError
from nybble.nn.kinds._base import Get, Kind, Operands, Quantized, Site, Stored, Target, live, module_at
from nybble.nn.kinds._layer import LayerKind
from nybble.nn.kinds._lookup import (
    REGISTRY,
    all_kinds,
    apart_line,
    kind_of,
    kind_of_entry,
    kind_of_quantized,
    look_alikes,
    matrix_at,
    read_by,
    targets_of,
    values_at,
)
from nybble.nn.layouts import Layouts

__all__ = [
    "REGISTRY", "Get", "Kind", "LayerKind", "Operands", "Quantized", "Site", "Stored", "Target", "all_kinds",
    "apart_line", "describe", "kind_of", "kind_of_entry", "kind_of_quantized", "live", "look_alikes", "matrix_at",
    "module_at", "prepare_quantized", "quant_modules", "read_by", "restore", "restore_all", "targets_of", "values_at",
]  # fmt: skip


def quant_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All quantized modules with their names."""
    for name, module in root.named_modules():
        if kind_of_quantized(module) is not None:
            yield name, module


def prepare_quantized(model: nn.Module) -> None:
    """Let a model call its quantized parts."""
    found = {kind for module in model.modules() if (kind := kind_of_quantized(module)) is not None}
    for kind in all_kinds():
        if kind in found:
            kind.prepare(model)


def describe(module: nn.Module, layouts: Layouts) -> dict[str, Any]:
    """How to rebuild a quantized module empty: the entry of a checkpoint's ``modules``."""
    kind = kind_of_quantized(module)
    if kind is None:
        raise ModelError(f"a {type(module).__name__} is no quantized module, so there is nothing to describe.")
    return kind.describe(module, layouts)


def restore_all(root: nn.Module, modules: Mapping[str, Any], layouts: Layouts) -> None:
    """:func:`restore` for each name and its entry, on the meta device."""
    with torch.device("meta"):
        # Those that read another come after it, in whatever order the file has them (transformers sorts config.json).
        for name, entry in sorted(modules.items(), key=lambda item: kind_of_entry(*item).reads_another):
            restore(root, name, entry, layouts)


def restore(root: nn.Module, name: str, entry: Any, layouts: Layouts) -> None:
    """Replace the float module (or fused parameter) at ``name`` by the empty quantized one that ``entry`` describes.

    ``entry`` is what :func:`describe` gave, read from a file that may say anything.

    Raises:
        FileError: the entry is malformed. ModelError: the model has no such module.
    """
    kind = kind_of_entry(name, entry)
    try:
        kind.restore(root, name, entry, layouts)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise FileError(f"malformed description of {name} ({type(error).__name__}: {error}).") from error
