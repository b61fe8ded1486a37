"""Bytes of a KV cache, exactly, from a model's config.json and without the model: what a full context stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.core.errors import ModelError
from nybble.models.build.config_file import read_json

FLOAT_BYTES = 2
"""Of a value that is left in float: models run in bfloat16."""
SHAPE = ("layers", "kv_heads", "head_dim")
"""Columns of a model whose layers all cache whole texts."""


@dataclass(frozen=True, kw_only=True)
class KVShape:
    """``heads`` of keys and values, ``width`` of one, ``windows``: of each layer its sliding window, None for none."""

    heads: int
    width: int
    windows: tuple[int | None, ...]


def shape_of(config: Mapping[str, Any], model: str) -> KVShape:
    """Read what config.json says.

    Raises:
        ModelError: a model that caches something else, or a config that doesn't say.
    """
    said = config.get("text_config") or config
    if said.get("kv_lora_rank"):
        raise ModelError(f"{model}: its cache holds latents, not keys and values; they aren't counted here.")
    layers, heads = said.get("num_hidden_layers") or said.get("n_layer"), _heads(said)
    hidden = said.get("hidden_size") or said.get("n_embd")
    if not (layers and heads and hidden):
        raise ModelError(f"{model}: its config.json doesn't say layers, heads and width, so no cache can be counted.")
    kinds = said.get("layer_types") or [_usual(said)] * layers
    if odd := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise ModelError(f"{model}: layers of {', '.join(odd)} cache something else beside keys and values.")
    window = said.get("sliding_window")
    return KVShape(
        heads=said.get("num_key_value_heads") or heads, width=said.get("head_dim") or hidden // heads,
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
    )  # fmt: skip


def config_of(model: str) -> Mapping[str, Any]:
    """What a model's config.json says, wherever the model is.

    Raises:
        FileError, ModelError: it can't be read, or there is no such model.
    """
    path = Path(model) / "config.json"
    if path.is_file():
        return read_json(path)
    from nybble.models.sources.open import open_source

    found: Mapping[str, Any] = open_source(model).config.to_dict()
    return found


def shape_columns(model: str) -> dict[str, int]:
    """The columns :data:`SHAPE` of a model, so that its cache is counted where the model isn't; or nothing."""
    try:
        shape = shape_of(config_of(model), model)
    except ModelError:
        return {}
    if any(window is not None for window in shape.windows):
        return {}
    return dict(zip(SHAPE, (len(shape.windows), shape.heads, shape.width), strict=True))


def _heads(said: Mapping[str, Any]) -> Any:
    return said.get("num_attention_heads") or said.get("n_head")


def _usual(said: Mapping[str, Any]) -> str:
    """Of layers that a config doesn't tell apart, as transformers reads it: all slide if there is a window in use."""
    slides = said.get("sliding_window") and said.get("use_sliding_window", True)
    return "sliding_attention" if slides else "full_attention"


def kv_bytes(shape: KVShape, tokens: int, batch: int, kv: str | None = None) -> int:
    """Bytes of keys and values of so many tokens of each of ``batch`` texts: codes, scales, and what stays in float.

    Args:
        shape: of the cache.
        tokens: of a text.
        batch: texts at a time.
        kv: a KV cache's line; None: all in bfloat16.

    Raises:
        UsageError: a malformed line. GranularityError: it doesn't divide the width of a head.
    """
    if kv is None:
        stored = sum(tokens if window is None else min(tokens, window - 1) for window in shape.windows)
        return 2 * stored * batch * shape.heads * shape.width * FLOAT_BYTES
    import torch

    from nybble.kv_format import KVFormat
    from nybble.nn.kv_rows import TokenRows

    made, total = KVFormat.parse(kv), 0
    if any(window is not None for window in shape.windows):
        raise ModelError("a sliding window's cache in few bits isn't counted here; leave kv in float.")
    for side, quantizer in (("keys", made.keys), ("values", made.values)):
        first, last = made.rounded(side, tokens)
        few = last - first
        if quantizer is not None and few:
            probe = TokenRows(quantizer, 0, torch.zeros(1, 1, 0, shape.width, dtype=torch.bfloat16))
            span = probe.span
            probe.append(torch.zeros(1, 1, span, shape.width, dtype=torch.bfloat16))
            total += few // span * probe.nbytes()  # tokens are stored in rows of their own, so they add up
        total += (tokens - few) * shape.width * FLOAT_BYTES
    return total * batch * shape.heads * len(shape.windows)
