"""Embeddings keep 32-bit states unless asked otherwise."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_MARK = "_nybble_state_in_float32"


def mark_wide(p: Tensor) -> None:
    """Have the parameter's states kept in float32 by every optimizer of :mod:`nybble.optim`."""
    setattr(p, _MARK, True)


def is_wide(p: Any) -> bool:
    """Whether :func:`mark_wide` marked it."""
    return bool(getattr(p, _MARK, False))


def split_embeddings(module: nn.Module) -> list[dict[str, Any]]:
    """Groups of a module's trainable parameters: the embeddings' keep 32-bit states, all others the optimizer's.

    Rows of an embedding that are seldom drawn have gradients unlike those of all others (Dettmers et al. 2022, section
    2.3); a table that an output head shares is an embedding's. To quantize these states too, pass
    ``module.parameters()`` instead of the module: an optimizer can't tell what a bare parameter belongs to.

    Returns:
        one or two groups of named parameters.
    """
    kinds = (nn.Embedding, nn.EmbeddingBag)
    tables = {id(p) for m in module.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False)}
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    others = {"params": [(name, p) for name, p in named if id(p) not in tables]}
    embeddings = {"params": [(name, p) for name, p in named if id(p) in tables], "state": None}
    return [group for group in (others, embeddings) if group["params"]]
