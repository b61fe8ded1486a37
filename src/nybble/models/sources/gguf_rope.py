"""How a GGUF's model rotates queries and keys, as transformers' ``rope_parameters``: the inverse of ``gguf/rope.py``.

llama.cpp divides each frequency by a factor of ``rope_freqs`` (Llama 3's scaling, which no metadata tell), or of
``rope_factors_long`` and ``_short`` (LongRoPE). Factors that are Llama 3's become its parameters; all others LongRoPE's
lists, by which transformers divides the same frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from nybble.core.errors import ModelError

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
FACTORS = (FREQS, LONG, SHORT)
"""Tensors that belong to the rope, float32 [head's width / 2]."""
Factors = np.ndarray[Any, np.dtype[np.float32]]
_LOW, _HIGH = 1.0, 4.0
"""Llama 3's ``low_freq_factor`` and ``high_freq_factor``: the same in all of its releases."""


def shortest(value: float) -> float:
    """A float32 from the file as the decimal it was written as: 9.99999974e-06 -> 1e-05; the float32 is the same."""
    return float(str(np.float32(value)))


def number(metadata: Mapping[str, Any], key: str, place: str) -> int | float:
    """A number of the metadata.

    Raises:
        ModelError: it isn't there, or is something else.
    """
    value = metadata.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelError(f"{place}: {key} is {value!r}; one number is needed.")
    return shortest(value) if isinstance(value, float) else value


def rope_parameters(
    metadata: Mapping[str, Any], at: str, factors: Mapping[str, Factors], raw: Mapping[str, Any], place: str
) -> dict[str, Any]:
    """The config's ``rope_parameters``, of one kind of layers.

    Args:
        metadata: of the file.
        at: leading part of its keys, ``llama.rope``.
        factors: those tensors of :data:`FACTORS` that the file has, and its architecture in llama.cpp uses.
        raw: what else the config says.
        place: for messages.

    Raises:
        ModelError: a rope that transformers can't say, or one that contradicts itself.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0}
    if f"{at}.freq_base" in metadata:
        rope["rope_theta"] = float(number(metadata, f"{at}.freq_base", place))
    _check(factors, raw, place)
    scaling = metadata.get(f"{at}.scaling.type", "linear")
    if scaling == "linear":
        found = [key for key in ("scaling.factor", "scale_linear") if f"{at}.{key}" in metadata]
        factor = float(number(metadata, f"{at}.{found[0]}", place)) if found else 0.0
        rope |= {"rope_type": "linear", "factor": factor} if factor else {}  # 0: none
    elif scaling == "yarn":
        rope |= _yarn(metadata, f"{at}.scaling", place)
    elif scaling == "longrope":
        return rope | _long(metadata, f"{at}.scaling", factors, raw, place)
    elif scaling != "none":
        raise ModelError(f"{place}: rope scaling {scaling!r} is not read from GGUF; use the model's safetensors.")
    if rope["rope_type"] == "yarn" and not factors:
        return rope
    return rope | _divided(metadata, f"{at}.scaling", factors, rope, raw, place)


def _check(factors: Mapping[str, Factors], raw: Mapping[str, Any], place: str) -> None:
    """Each list has a factor for every pair of channels of a head."""
    pairs = (raw.get("head_dim") or raw["hidden_size"] // max(raw["num_attention_heads"], 1)) // 2
    for name, found in factors.items():
        if found.shape != (pairs,):
            raise ModelError(f"{place}: {name} is {list(found.shape)}; a head has {pairs} pairs of channels.")
        if not (np.isfinite(found).all() and (found > 0).all()):
            raise ModelError(f"{place}: {name} divides frequencies, and holds numbers that are not above 0.")


def _yarn(metadata: Mapping[str, Any], at: str, place: str) -> dict[str, Any]:
    """YaRN's part of them; what llama.cpp does with ``attn_factor`` is in :mod:`nybble.models.gguf.rope`."""
    for key in ("yarn_ext_factor", "yarn_log_multiplier"):
        if f"{at}.{key}" in metadata:
            raise ModelError(f"{place}: YaRN with {key} is not read from GGUF; use the model's safetensors.")
    factor = float(number(metadata, f"{at}.factor", place))
    if not factor >= 1:
        raise ModelError(f"{place}: {at}.factor is {factor}; YaRN's is 1 or more.")
    found: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    found["original_max_position_embeddings"] = int(number(metadata, f"{at}.original_context_length", place))
    for key in ("beta_fast", "beta_slow"):
        if f"{at}.yarn_{key}" in metadata:
            found[key] = float(number(metadata, f"{at}.yarn_{key}", place))
    if f"{at}.attn_factor" in metadata:
        found["attention_factor"] = _attention(metadata, at, place) * (1 + 0.1 * math.log(factor))
    return found


def _attention(metadata: Mapping[str, Any], at: str, place: str) -> float:
    """What llama.cpp multiplies cosine and sine with."""
    key = f"{at}.attn_factor"
    return float(number(metadata, key, place)) if key in metadata else 1.0


def _long(
    metadata: Mapping[str, Any], at: str, factors: Mapping[str, Factors], raw: Mapping[str, Any], place: str
) -> dict[str, Any]:
    lacking = [name for name in (LONG, SHORT) if name not in factors]
    if lacking or FREQS in factors:
        what = f"lacks {lacking[0]}" if lacking else f"has {FREQS} too"
        raise ModelError(f"{place}: rope scaling 'longrope' needs two lists of factors, and the file {what}.")
    original = int(number(metadata, f"{at}.original_context_length", place))
    if original < 1:
        raise ModelError(f"{place}: {at}.original_context_length is {original}; a number of tokens is needed.")
    return {
        "rope_type": "longrope",
        "long_factor": _list(factors[LONG]),
        "short_factor": _list(factors[SHORT]),
        "original_max_position_embeddings": original,
        "factor": raw["max_position_embeddings"] / original,
        "attention_factor": _attention(metadata, at, place),
    }


def _divided(
    metadata: Mapping[str, Any],
    at: str,
    factors: Mapping[str, Factors],
    rope: Mapping[str, Any],
    raw: Mapping[str, Any],
    place: str,
) -> dict[str, Any]:
    """Of frequencies under no other scaling: nothing, Llama 3's parameters, or the factors themselves."""
    attention, found = _attention(metadata, at, place), factors.get(FREQS)
    if found is None and not factors and attention == 1:
        return {}
    if rope["rope_type"] != "default" or LONG in factors or SHORT in factors:
        has = next(iter(factors), f"{at}.attn_factor")
        raise ModelError(
            f"{place}: {has} beside rope scaling {rope['rope_type']!r} is not read from GGUF; use the model's "
            "safetensors."
        )
    if found is None:
        found = np.ones((raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]) // 2, np.float32)
    elif attention == 1 and (known := _llama3(found, rope["rope_theta"])):
        return known
    return {
        "rope_type": "longrope",
        "long_factor": _list(found),
        "short_factor": _list(found),
        "original_max_position_embeddings": int(raw["max_position_embeddings"]),
        "factor": 1.0,
        "attention_factor": attention,
    }


def _llama3(factors: Factors, theta: float) -> dict[str, Any]:
    """The parameters of Llama 3's scaling that gives these factors; empty where none does."""
    factor = round(float(factors.max()), 4)  # the last bit of a float32 is no part of it
    turns = theta ** -(np.arange(len(factors)) / len(factors)) / (2 * math.pi)  # a token
    for original in (1 << power for power in range(5, 21)):
        smooth = np.clip((original * turns - _LOW) / (_HIGH - _LOW), 0.0, 1.0)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": original,
            }
    return {}


def _list(factors: Factors) -> list[float]:
    return [shortest(float(each)) for each in factors]
