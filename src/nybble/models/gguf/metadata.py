"""What a transformers config says, as GGUF metadata: the table of ``sources/gguf_names.py``, read backwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nybble.core.errors import ModelError
from nybble.models.gguf.rope import rope_pairs
from nybble.models.sources.gguf_names import ARCHS, WHOLE, GgufArch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ALSO = {"mistral": "llama"}
"""Model types beside those of the table that llama.cpp runs as one of its architectures."""


def arch_for(config: PreTrainedConfig) -> tuple[str, GgufArch]:
    """llama.cpp's name of an architecture, and its row of the table.

    Raises:
        ModelError: none that nybble knows, or the model computes something that the architecture doesn't.
    """
    wanted = ALSO.get(config.model_type, config.model_type)
    found = next(((name, arch) for name, arch in ARCHS.items() if wanted in (arch.model_type, name)), None)
    if found is None:
        raise ModelError(
            f"a model of type {config.model_type!r} can't be written as GGUF; nybble writes "
            f"{', '.join(sorted([*(arch.model_type for arch in ARCHS.values()), *ALSO]))}. Use another target."
        )
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", "silu")
    wants = ("gelu_pytorch_tanh",) if found[1].norm_offset else ("silu", "swish")
    if activation not in wants:
        raise ModelError(f"GGUF's {found[0]} computes {wants[0]}; this model's activation is {activation}.")
    if found[1].model_type == "llama" and getattr(config, "mlp_bias", False):
        raise ModelError("GGUF's llama has no biases in the MLP (mlp_bias); use another target.")
    return found


def config_pairs(config: PreTrainedConfig, name: str, arch: GgufArch) -> dict[str, Any]:
    """Key -> int, float (32 bits) or str: what the architecture needs to know.

    Raises:
        ModelError: a rope that GGUF can't say.
    """
    pairs: dict[str, Any] = {}
    for key, meaning in [*arch.keys.items(), *arch.optional.items()]:
        value = getattr(config, meaning, None)
        if value is not None:
            pairs[f"{name}.{key}"] = value
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    pairs |= {
        f"{name}.attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        f"{name}.attention.key_length": width,
        f"{name}.attention.value_length": width,
        f"{name}.rope.dimension_count": width,
        f"{name}.vocab_size": config.vocab_size,
    }
    return pairs | rope_pairs(config, name, arch)


def lost_window(config: PreTrainedConfig, arch: GgufArch) -> int | None:
    """How many tokens a block attends to where its architecture in llama.cpp attends to all; None: nothing is lost."""
    window = getattr(config, "sliding_window", None)
    if not window or "sliding_window" in arch.optional.values() or window >= config.max_position_embeddings:
        return None
    return int(window)


def gguf_name(name: str, arch: GgufArch) -> str | None:
    """``model.layers.3.self_attn.q_proj.weight`` -> ``blk.3.attn_q.weight``; None for a tensor that has no place."""
    stem, _, kind = name.rpartition(".")
    whole = {module: tensor for tensor, module in WHOLE.items()}
    if kind not in ("weight", "bias"):
        return None
    if stem in whole:
        return f"{whole[stem]}.{kind}"
    number, _, part = stem.removeprefix("model.layers.").partition(".")
    inner = {module: tensor for tensor, module in arch.block.items()}
    if not stem.startswith("model.layers.") or not number.isdecimal() or part not in inner:
        return None
    return f"blk.{number}.{inner[part]}.{kind}"
