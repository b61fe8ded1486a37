"""ModelOpt's FP8 KV cache: E4M3 under one number a layer for keys and one for values, ``k_scale`` and ``v_scale``.

They are calibrated (``float8_e4m3fn tensor static``), or 1 of a quantizer without a scale. One that measures scales on
each token stores other codes; ModelOpt's form of it has none.
Source: nvidia-modelopt 0.47 (``torch/export/quant_utils.py: _KV_CACHE_REPLACEMENTS``).
"""

from __future__ import annotations

from typing import Any

import torch

from nybble.core.tensorfile import Planned
from nybble.kv_format import KVFormat, one_scale
from nybble.models.sources.layouts._ct_args import E4M3, CannotError
from nybble.nn.kv_model import KVRecord, cache_scales, cached_attentions
from nybble.quantizer import Quantizer

FP8 = KVFormat.parse(f"{E4M3} tensor scale=one")
"""As ModelOpt recommends it: no scale."""


def check_kv(kv: KVRecord, layers: int | None = None) -> None:
    """Check that ModelOpt has a word for a cache.

    Args:
        kv: what a model caches in.
        layers: how many cache; None where it isn't known.

    Raises:
        CannotError: it has none.
    """
    formats = {kv} if isinstance(kv, KVFormat) else set(kv.values())
    whole = isinstance(kv, KVFormat) or layers is None or len(kv) == layers
    if not whole or any(not one.plain or not (_fp8(one.keys) and _fp8(one.values)) for one in formats):
        came = next((str(one) for one in formats if one != FP8), str(FP8))
        why = "" if whole else "some layers cache in float"
        raise CannotError(
            f"KV cache {came}",
            f"{E4M3} tensor static, or {FP8}, in all layers, or the cache in float (--kv left out)",
            why,
        )


def _fp8(quantizer: Quantizer | None) -> bool:
    return quantizer is not None and quantizer.format.name == E4M3 and not quantizer.scale.has_offset


def measured(kv: KVRecord) -> bool:
    """Whether a cache finds scales for its tokens, which ModelOpt's form of it leaves out."""
    found = [kv] if isinstance(kv, KVFormat) else kv.values()
    return any(not side.static and one_scale(side) is None for one in found for side in (one.keys, one.values) if side)


def kv_tensors(model: Any, kv: KVRecord | None) -> dict[str, Planned]:
    """The scales of every layer that caches, float32 []."""
    scales = cache_scales(model, kv) or {}
    found = {}
    for name in cached_attentions(model):
        for leaf, scale in zip(("k_proj.k_scale", "v_proj.v_scale"), scales.get(name, (1.0, 1.0)), strict=True):
            found[f"{name}.{leaf}"] = _number(scale)
    return found


def _number(value: float) -> Planned:
    return Planned(dtype="F32", shape=(), bytes_from=lambda: torch.tensor(value, dtype=torch.float32))
