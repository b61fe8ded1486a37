"""One token at a time through a decoder whose layers are packed: what a kernel needs to do that in one call.

A module, a hook and a tensor for every step between the products cost a small model more than its products. Where a
model's layers are those of transformers' Llama (Mistral, Qwen2, Qwen3: the same with biases, or norms of heads),
nothing looks at what passes between them, and ``kernels/`` has a version for where they are, a token takes one call;
the numbers are those of the modules but for the order of float32 sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nybble.nn.kv_model import cache_argument
from nybble.nn.linear import QuantLinear
from nybble.nn.packed import Packed
from nybble.nn.plain import known_as
from nybble.ops.loader import load_at_first_use

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_TITLES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_PARTS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def _names(what: str) -> frozenset[str]:
    return frozenset(f"transformers.models.{f}.modeling_{f}.{_TITLES[f]}{what}" for f in _FAMILIES)


_MODELS, _LAYERS = _names("ForCausalLM"), _names("DecoderLayer")
_ATTENTIONS, _GATED, _NORMS = _names("Attention"), _names("MLP"), _names("RMSNorm")
_OF_HEADS = ("q_norm", "k_norm")


@dataclass(frozen=True)
class Layer:
    """One layer: ``linears`` q, k, v, o, gate, up, down; ``norms`` before attention, before the gates; of q and k."""

    linears: tuple[QuantLinear, ...]
    norms: tuple[Tensor, Tensor]
    of_heads: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Plan:
    """A decoder between its embedding and its head.

    Attributes:
        layers: in their order. last: weight of the last norm. eps: of all norms. dtype: of what passes.
        heads, key_heads, head: how many, and their width. scale: of the scores.
        rotary: its module, (x, position_ids) -> cos, sin.
    """

    layers: tuple[Layer, ...]
    last: Tensor
    eps: float
    dtype: torch.dtype
    heads: int
    key_heads: int
    head: int
    scale: float
    rotary: nn.Module


class Steps(Protocol):
    """What a kernel makes of a plan."""

    def fill(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keys and values so far, [sequences, key heads, tokens, head], of one layer."""

    def __call__(self, x: Tensor, position: int) -> Tensor:
        """Embeddings of one token a sequence [sequences, width] -> hidden states behind the last norm, same dtype."""


Kernel = Callable[[Plan, int, int], Steps | None]
"""(plan, sequences, tokens in all) -> what takes steps; None where it can't."""


class _Maker:
    """Finds the kernel of a device."""

    def __init__(self) -> None:
        self._kernels: dict[str, Kernel] = {}

    def register_kernel(self, device: str) -> Callable[[Kernel], Kernel]:
        def register(kernel: Kernel) -> Kernel:
            self._kernels[device] = kernel
            return kernel

        return register

    @staticmethod
    def _init_fn(plan: Plan, sequences: int, tokens: int) -> Steps | None:
        return None

    def __call__(self, plan: Plan, sequences: int, tokens: int) -> Steps | None:
        kernel = self._kernels.get(plan.last.device.type, self._init_fn)
        return kernel(plan, sequences, tokens)


make_steps = _Maker()
load_at_first_use([make_steps])


class Decoding:
    """Writes tokens behind a prompt, which the model's own forward reads.

    Args:
        model: a causal language model.
        steps: what a kernel made of its plan.
    """

    def __init__(self, model: Any, steps: Steps) -> None:
        self._model, self._steps, self._position = model, steps, 0

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """The prompt, int64 [sequences, tokens], all of one length; logits of its last token."""
        found = self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
        cache = getattr(found, cache_argument(type(self._model)), None) or found.past_key_values
        for number, layer in enumerate(cache.layers):
            self._steps.fill(number, layer.keys, layer.values)
        self._position = ids.shape[1]
        logits: Tensor = found.logits[:, -1]
        return logits

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """The next token of each sequence, int64 [sequences]; logits of what follows it, [sequences, vocabulary]."""
        x = self._model.get_input_embeddings()(ids)
        hidden = self._steps(x, self._position)
        self._position += 1
        logits: Tensor = self._model.get_output_embeddings()(hidden)
        return logits


def decoding_of(model: Any, sequences: int, tokens: int) -> Decoding | None:
    """What writes with a model in one call a token; None where the modules have to be called.

    Args:
        model: a language model.
        sequences: written at once.
        tokens: at most so many in each, with the prompt's.
    """
    plan = plan_of(model)
    steps = None if plan is None else make_steps(plan, sequences, tokens)
    return None if steps is None else Decoding(model, steps)


def plan_of(model: Any) -> Plan | None:
    """The plan of a model; None where it is of another family, or does more than that says."""
    if not known_as(model, _MODELS) or _watched(model) or model.training:
        return None
    config, body = model.config, model.model
    scaled = config._attn_implementation not in ("sdpa", "eager") or getattr(config, "hidden_act", "silu") != "silu"
    if scaled or getattr(config, "use_sliding_window", False) or _slides(config):
        return None
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") not in (
        "default",
        "linear",
        "llama3",
    ):
        return None
    layers = [_layer_of(layer) for layer in body.layers]
    if any(layer is None for layer in layers) or not known_as(body.norm, _NORMS):
        return None
    attention = body.layers[0].self_attn
    return Plan(
        layers=tuple(layer for layer in layers if layer is not None),
        last=body.norm.weight.detach(),
        eps=body.norm.variance_epsilon,
        dtype=body.norm.weight.dtype,
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head=attention.head_dim,
        scale=attention.scaling,
        rotary=body.rotary_emb,
    )


def _slides(config: Any) -> bool:
    return config.model_type == "mistral" and getattr(config, "sliding_window", None) is not None


def _layer_of(layer: nn.Module) -> Layer | None:
    attention, gates = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    if not (known_as(layer, _LAYERS) and known_as(attention, _ATTENTIONS) and known_as(gates, _GATED)):
        return None
    linears = [layer.get_submodule(f"{part}.{name}") for part, names in _PARTS.items() for name in names]
    norms = [layer.get_submodule(name) for name in ("input_layernorm", "post_attention_layernorm")]
    heads = [attention.get_submodule(name) for name in _OF_HEADS if name in attention._modules]
    if not all(known_as(norm, _NORMS) for norm in (*norms, *heads)):
        return None
    plain = [m for m in linears if type(m) is QuantLinear and m.outputs is None and _reads_packed(m.weight)]
    if len(plain) < len(linears):
        return None
    weights = [norm.weight.detach() for norm in (*norms, *heads)]  # type: ignore[operator]
    return Layer(tuple(plain), (weights[0], weights[1]), (weights[2], weights[3]) if heads else None)


def _reads_packed(weight: Any) -> bool:
    return isinstance(weight, Packed) and not (weight.brought or weight.holds)


def _watched(model: nn.Module) -> bool:
    """Whether anything but the modules' own forwards is called."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return any(getattr(m, h) for m in model.modules() for h in hooks) or any(
        hasattr(m, "_hf_hook") or "forward" in m.__dict__ for m in model.modules()
    )
