"""How a model rotates queries and keys, as GGUF says it: metadata, and tensors that divide the frequencies.

llama.cpp (``src/llama-context.cpp``, ``ggml_rope_ext``) multiplies cosine and sine under YaRN by ``0.1 ln(factor) + 1``
and, under every rope, by ``rope.scaling.attn_factor``; what a file says of ``yarn_attn_factor`` it overwrites. So
another attention factor than YaRN's usual one is written as the ratio of the two.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from nybble.core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from nybble.models.sources.gguf_names import GgufArch

Factors = np.ndarray[Any, np.dtype[np.float32]]
_KINDS = ("default", "linear", "yarn", "llama3", "longrope")
_RAMP = ("beta_fast", "beta_slow", "truncate")


def rope_pairs(config: PreTrainedConfig, name: str, arch: GgufArch) -> dict[str, Any]:
    """Key -> int, float (32 bits) or str.

    Args:
        config: of the model.
        name: of the architecture in llama.cpp.
        arch: its row.

    Raises:
        ModelError: a rope that GGUF, or this architecture in llama.cpp, can't say.
    """
    rope = _parameters(config)
    kind = _said(rope, config)
    _check_kind(kind, name, arch)
    tensors = rope_tensors(config)  # raises where they can't be
    if arch.model_type != "llama" and tensors:
        raise ModelError(
            f"GGUF's {name} rotates by no other ramp of YaRN than that of beta_fast=32, beta_slow=1, truncate=true; "
            "use another target."
        )
    at = f"{name}.rope"
    pairs: dict[str, Any] = {f"{at}.freq_base": float(rope["rope_theta"])}
    if kind in ("linear", "yarn", "longrope"):
        pairs[f"{at}.scaling.type"] = kind
    if kind in ("linear", "yarn"):
        pairs[f"{at}.scaling.factor"] = _factor(rope, config)
    if kind in ("yarn", "longrope"):
        pairs[f"{at}.scaling.original_context_length"] = _original(rope)
    if kind == "yarn":
        pairs |= {f"{at}.scaling.yarn_{key}": float(rope[key]) for key in ("beta_fast", "beta_slow") if rope.get(key)}
    theirs = 1 + 0.1 * math.log(max(1.0, _factor(rope, config))) if kind == "yarn" else 1.0
    ratio = (_computed(config)[1] if _kind(rope) in ("yarn", "longrope") else 1.0) / theirs
    if not math.isclose(ratio, 1.0, rel_tol=1e-7):
        pairs[f"{at}.scaling.attn_factor"] = ratio
    local = getattr(config, "rope_parameters", {}).get("sliding_attention")
    if local is not None and float(local["rope_theta"]) != arch.local_rope_theta:
        raise ModelError(
            f"GGUF's {name} rotates local layers with a base of {arch.local_rope_theta}, not {local['rope_theta']}."
        )
    return pairs


def rope_tensors(config: PreTrainedConfig) -> dict[str, Factors]:
    """Tensors of what llama.cpp divides each frequency by; none where metadata say all. [head's width / 2] each.

    ``rope_freqs``: of Llama 3, and of YaRN with other ends of its ramp than the usual ones, which llama.cpp has for
    some other architectures only. ``rope_factors_long`` and ``_short``: LongRoPE's own lists.

    Raises:
        ModelError: lists of another length; a scaling without its original length.
    """
    rope = _parameters(config)
    kind = _kind(rope)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if kind == "longrope":
        sides = {side: np.asarray(rope.get(f"{side}_factor") or [], np.float32) for side in ("long", "short")}
        for side, found in sides.items():
            if found.shape != (width // 2,):
                raise ModelError(f"LongRoPE's {side}_factor has {found.size} numbers; a head has {width // 2} pairs.")
        return {f"rope_factors_{side}.weight": found for side, found in sides.items()}
    if kind != "llama3" and _said(rope, config) == kind:
        return {}
    _original(rope)
    plain = float(rope["rope_theta"]) ** -(np.arange(0, width, 2) / width)
    return {"rope_freqs.weight": (plain / _computed(config)[0]).astype(np.float32)}


def lengths_differ(config: PreTrainedConfig) -> str:
    """What of a rope follows the length of the text here and something else in llama.cpp, in a line; or empty."""
    rope = _parameters(config)
    if _kind(rope) != "longrope":
        return ""
    return (
        f"LongRoPE: llama.cpp takes the long factors where its context (-c) is longer than {_original(rope)} tokens, "
        "this model where the text is"
    )


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type", "default"))


def _said(rope: Mapping[str, Any], config: PreTrainedConfig) -> str:
    """The kind that the file says; ``default`` too where a tensor says all of YaRN."""
    kind = _kind(rope)
    if kind != "yarn" or not any(key in rope for key in _RAMP):
        return kind
    usual = copy.deepcopy(config)
    usual.rope_parameters = {key: value for key, value in rope.items() if key not in _RAMP}
    _original(rope)
    return "yarn" if np.array_equal(_computed(config)[0], _computed(usual)[0]) else "default"


def _check_kind(kind: str, name: str, arch: GgufArch) -> None:
    if kind not in _KINDS:
        raise ModelError(
            f"rope scaling {kind!r} can't be written as GGUF; {', '.join(_KINDS[:-1])} and {_KINDS[-1]} can. "
            "Use another target."
        )
    if kind in ("llama3", "longrope") and arch.model_type != "llama":
        raise ModelError(f"GGUF's {name} has no rope scaling of type {kind}; use another target.")
    if kind == "yarn" and arch.local_rope_theta is not None:
        raise ModelError(f"GGUF's {name} would scale its local layers by YaRN too; use another target.")


def _parameters(config: PreTrainedConfig) -> Mapping[str, Any]:
    rope = config.rope_parameters
    found: Mapping[str, Any] = rope.get("full_attention", rope)
    if float(found.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError("a model that rotates only a part of each head can't be written as GGUF by nybble.")
    return found


def _original(rope: Mapping[str, Any]) -> int:
    value = rope.get("original_max_position_embeddings")
    if not value:
        raise ModelError(f"rope scaling {_kind(rope)!r} needs original_max_position_embeddings; config.json has none.")
    return int(value)


def _factor(rope: Mapping[str, Any], config: PreTrainedConfig) -> float:
    value = rope.get("factor")
    return float(config.max_position_embeddings / _original(rope) if value is None else value)


def _computed(config: PreTrainedConfig) -> tuple[np.ndarray[Any, Any], float]:
    """As transformers does: angles a token, [head's width / 2], and what cosine and sine are multiplied by."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    angles, factor = ROPE_INIT_FUNCTIONS[_kind(_parameters(config))](config, None)
    return angles.double().numpy(), float(factor)
