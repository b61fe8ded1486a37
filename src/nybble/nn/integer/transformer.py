"""A quantized transformer whose own forward carries integers: blocks of codes with shifts in its tensors' place.

Embeddings, linear layers, layer norms and activations are replaced by integer ones for a while, and attention by
transformers' own interface; views, dropout and residual sums are the model's. Source: BCT (Dong & Chen 2023,
arXiv:2304.01483), shifts from each strip's own maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn

from nybble.core.errors import ModelError, SchemeError, UsageError
from nybble.nn.config import config_of
from nybble.nn.embedding import QuantEmbedding, TiedEmbedding, TiedHead
from nybble.nn.integer.block_attention import IMPLEMENTATION, attend
from nybble.nn.integer.block_layers import STRIP, BlockEmbedding, BlockLinear, strip_of
from nybble.nn.integer.block_norm import BlockNorm
from nybble.nn.integer.block_table import BlockTable
from nybble.nn.layer import QuantLayer
from nybble.nn.linear import QuantLinear
from nybble.nn.plain import computes_as
from nybble.nn.swap import set_module

_POINTWISE = (nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.Sigmoid)


def in_blocks(model: nn.Module) -> bool:
    """Whether what enters a model's layers is rounded in strips whose scales are measured powers of two."""
    return any(
        isinstance(m, QuantLayer) and m.inputs is not None and strip_of(m.inputs.quantizer) for m in model.modules()
    )


@contextmanager
def of_blocks(model: nn.Module, simulate: bool = False) -> Iterator[None]:
    """Let a model's forward go through in integers; what it gives are :class:`nybble.nn.integer.blocks.Blocks`.

    Args:
        model: of transformers, its embeddings and linear layers quantized, inputs as ``int8 group=N scale=pow2``.
        simulate: hold the same integers in float64, which GPUs have products of too.

    Raises:
        UsageError: integers elsewhere than on the CPU. NybbleError: a module that has no integer form, by name.
    """
    device = next(chain(model.parameters(), model.buffers())).device
    if device.type != "cpu" and not simulate:
        raise UsageError(f"integers run on the CPU, where torch has their products; this model is on {device}.")
    made = {name: module for name, old in model.named_modules() if (module := _stand_in(name, old, simulate))}
    before = {name: model.get_submodule(name) for name in made}
    configs = list({id(c): c for m in model.modules() if (c := config_of(m)) is not None}.values())
    kept = [getattr(config, "_attn_implementation", None) for config in configs]
    _register()
    try:
        for name, module in made.items():
            set_module(model, name, module.eval().to(device))
        for config in configs:
            config._attn_implementation = IMPLEMENTATION
        yield
    finally:
        for name, old in before.items():
            set_module(model, name, old)
        for config, implementation in zip(configs, kept, strict=True):
            config._attn_implementation = implementation


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def mask(*args: Any, **kwargs: Any) -> Any:
        return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})

    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, mask)


def _stand_in(name: str, module: nn.Module, simulate: bool) -> nn.Module | None:
    """What calculates in integers as a module does in floats; None for those that only call others."""
    if isinstance(module, QuantEmbedding | TiedEmbedding):
        if module.scale is not None:
            raise SchemeError(f"{name}: its rows are multiplied by {module.scale.value}; integers don't follow there.")
        return BlockEmbedding(name, module.weight, simulate)
    if isinstance(module, QuantLinear | TiedHead):
        return BlockLinear(name, module)
    if computes_as(module, (nn.LayerNorm,)):
        return _norm(name, module)
    if isinstance(module, _POINTWISE) or type(module).__module__ == "transformers.activations":
        function: Callable[[Tensor], Tensor] = module
        return BlockTable(function)
    if isinstance(module, QuantLayer | nn.Linear | nn.Embedding) or _has_own_tensors(module):
        raise SchemeError(
            f"{name}: a {type(module).__name__} has no form in blocks of integers. Quantize embeddings and linear "
            "layers as the recipe bct does, and nothing else."
        )
    return None


def _has_own_tensors(module: nn.Module) -> bool:
    return any(p is not None for p in module._parameters.values())


def _norm(name: str, module: Any) -> BlockNorm:
    if len(module.normalized_shape) != 1 or module.weight is None or module.bias is None:
        raise ModelError(f"{name}: a layer norm in integers is over the last dimension, and has weights and biases.")
    return BlockNorm(module.weight.detach(), module.bias.detach(), module.eps, STRIP)
