"""Attention whose two products take rounded operands: query times key, probabilities times value.

Registered with transformers as the attention implementation ``nybble``; a module without a ``matmuls`` part computes
what ``eager`` does, in the same order. Linear layers around it are quantized by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import FileError, ModelError
from nybble.nn.activation import ActivationQuantizer

IMPLEMENTATION = "nybble"
PART = "matmuls"
OPERANDS = ("query", "key", "probabilities", "value")


class MatmulQuantizers(nn.Module):
    """The quantizers of one attention's operands, each one scale for the tensor (or measured on it).

    Args:
        operands: by the names of :data:`OPERANDS`.
    """

    def __init__(self, operands: Mapping[str, ActivationQuantizer]) -> None:
        super().__init__()
        if set(operands) != set(OPERANDS):
            raise FileError(f"attention has the operands {', '.join(OPERANDS)}; got {', '.join(operands)}.")
        for name in OPERANDS:
            self.add_module(name, operands[name])

    def forward(self, name: str, x: Tensor) -> Tensor:
        """The operand ``name``, rounded."""
        rounded: Tensor = self.get_submodule(name)(x)
        return rounded

    def to_dict(self) -> dict[str, Any]:
        """Lines and static parameters, for config.json."""
        found: dict[str, Any] = {}
        for name in OPERANDS:
            part = self.get_submodule(name)
            assert isinstance(part, ActivationQuantizer)
            found[name] = part.to_dict()
        return found

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> MatmulQuantizers:
        """Inverse of :meth:`to_dict` with empty parameters."""
        return MatmulQuantizers({name: ActivationQuantizer.from_dict(data[name]) for name in data})


class OperandWatch(nn.Module):
    """Stands where :class:`MatmulQuantizers` will: shows each operand to a function and passes it on."""

    def __init__(self, see: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.see = see

    def forward(self, name: str, x: Tensor) -> Tensor:  # noqa: D102
        self.see(name, x)
        return x


def quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention, operands through ``module.matmuls`` where there is one.

    Args:
        module: the attention; ``num_key_value_groups`` queries share a key.
        query: [batch, heads, tokens, width].
        key: [batch, key heads, tokens, width].
        value: [batch, key heads, tokens, width].
        attention_mask: added to the scores; None adds nothing.
        scaling: of the scores; default width ** -0.5.
        dropout: of the probabilities, in training.
        position_bias: added to the scores before the mask.
        softcap: Gemma 2's cap of the scores.

    Returns:
        [batch, tokens, heads, width], and the probabilities as they were before rounding.
    """
    parts = getattr(module, PART, None)

    def rounded(name: str, x: Tensor) -> Tensor:
        return x if parts is None else parts(name, x)

    query, key, value = rounded("query", query), rounded("key", key), rounded("value", value)
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, dropout, module.training)
    output = torch.matmul(rounded("probabilities", probabilities), value)
    return output.transpose(1, 2).contiguous(), probabilities


def attentions(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that call transformers' attention interface, with their names."""
    for name, module in root.named_modules():
        if "Attention" in type(module).__name__ and hasattr(module, "is_causal") and hasattr(module, "scaling"):
            yield name, module


def use_quantized_attention(model: Any) -> None:
    """Let the model call :func:`quantized_attention`.

    Raises:
        ModelError: its attention is not one that transformers lets replace.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(IMPLEMENTATION, quantized_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
    if not any(True for _ in attentions(model)):
        raise ModelError(f"{type(model).__name__} has no attention whose products can be quantized.")
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = IMPLEMENTATION
