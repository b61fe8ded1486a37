"""Attention whose two products take rounded operands: query times key, probabilities times value.

Registered with transformers as the attention implementation ``nybble``. It is the eager attention of the model's own
family, called with rounded queries, keys and values, and with the probabilities rounded where it multiplies them by the
values: so whatever a family does beside (sinks, caps, biases, masks) is done, and without a ``matmuls`` part the result
is that of ``eager`` bit for bit. What ``eager`` wouldn't compute is refused by name. Linear layers around it are
quantized by themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nybble.core.errors import FileError, ModelError
from nybble.matmul_format import OPERANDS
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.config import config_of
from nybble.nn.query_key import composed

IMPLEMENTATION = "nybble"
PART = "matmuls"
CACHED = "cached"
"""Name of the submodule that stands for an attention's cache while that is trained."""


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
    attention_mask: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """The model's own eager attention, with the operands of its two products through ``module.matmuls``.

    Args:
        module: the attention; its family's eager function computes everything (scaling, masks, caps, biases, sinks,
            dropout). Without ``matmuls`` that is all.
        query: [batch, heads, tokens, width].
        key: [batch, key heads, tokens, width].
        value: [batch, key heads, tokens, width].
        attention_mask: as for ``eager``.
        others: what the model hands over beside; the eager function must know it, or :data:`HARMLESS` must.

    Returns:
        what the eager function returns: [batch, tokens, heads, width], and the probabilities before rounding.

    Raises:
        ModelError: the module has no eager function, hands over an argument that it doesn't know, or doesn't compute
            two products; names the module's class.
    """
    eager = eager_attention(type(module))
    _check_arguments(module, eager, others)
    query, key = composed(module, query, key, others.get("scaling"))
    key, value = as_cached(module, key, value)
    parts = getattr(module, PART, None)
    if parts is None:
        found: tuple[Tensor, Tensor | None] = eager.function(module, query, key, value, attention_mask, **others)
        return found
    query, key, value = parts("query", query), parts("key", key), parts("value", value)
    rounding = _RoundProbabilities(parts, key.shape[-2])
    with rounding:
        found = eager.function(module, query, key, value, attention_mask, **others)
    if rounding.products != 2 or not rounding.done:
        raise ModelError(
            f"{type(module).__name__} doesn't multiply queries by keys and then probabilities by values, and nothing "
            f"else: which operands {PART} would round can't be told. {_LEAVE_OUT}"
        )
    return found


def as_cached(module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as an attention's cache will hold them, while that is trained; else as they are."""
    part = getattr(module, CACHED, None)
    return (key, value) if part is None else part(key, value)


class _RoundProbabilities(TorchFunctionMode):
    """Rounds the left operand of the second matrix product that runs inside: the probabilities, as they are used.

    Args:
        parts: rounds an operand by name. keys: how many probabilities a query has.
    """

    def __init__(self, parts: Callable[[str, Tensor], Tensor], keys: int) -> None:
        super().__init__()
        self.parts, self.keys, self.products, self.done = parts, keys, 0, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            self.products += 1
            if self.products == 2 and args and args[0].shape[-1] == self.keys:
                args, self.done = (self.parts("probabilities", args[0]), *args[1:]), True
        return func(*args, **(kwargs or {}))


_PRODUCTS = frozenset((torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm))
_LEAVE_OUT = f"Leave {PART} out of the scheme for this model."

HARMLESS = frozenset((
    "sliding_window", "is_causal",  # the mask that eager attention adds holds them
    "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",  # the same, packed
    "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "num_items_in_batch",
    "deterministic",  # of kernels
))  # fmt: skip
"""Arguments that change no number of eager attention, whether its function names them or not."""

_ELSEWHERE = ("reorder_and_upcast_attn",)
"""Options by which a family's eager attention is another than the function it hands over (GPT-2's)."""


class Eager(NamedTuple):
    """An eager attention: the function, the arguments that it names, and the attributes that it may read."""

    function: Callable[..., Any]
    arguments: frozenset[str]
    reads: tuple[str, ...]


def eager_attention(kind: type[nn.Module]) -> Eager:
    """The eager function that the forward of an attention class hands to transformers as the default.

    Raises:
        ModelError: there is none, or more than one.
    """
    if kind not in _EAGER:  # no functools.cache, about which torch.compile warns
        _EAGER[kind] = _find_eager(kind)
    return _EAGER[kind]


_EAGER: dict[type[nn.Module], Eager] = {}


def _find_eager(kind: type[nn.Module]) -> Eager:
    forward = inspect.unwrap(kind.forward)
    code = getattr(forward, "__code__", None)
    names = [] if code is None else [name for name in code.co_names if "eager" in name]
    found = [forward.__globals__[name] for name in names if inspect.isfunction(forward.__globals__.get(name))]
    if len(found) != 1:
        raise ModelError(f"{kind.__name__} hands no eager attention of its own to transformers. {_LEAVE_OUT}")
    function = inspect.unwrap(found[0])
    return Eager(found[0], frozenset(inspect.signature(function).parameters), function.__code__.co_names)


def _check_arguments(module: nn.Module, eager: Eager, others: Mapping[str, Any]) -> None:
    """Raise ModelError where eager attention would leave out what the model asks of its attention.

    A tensor that the eager function takes from the module itself (``module.sinks``, which other implementations get as
    ``s_aux``) is known.
    """
    for name, value in others.items():
        if value is None or name in eager.arguments or name in HARMLESS:
            continue
        held = isinstance(value, Tensor) and any(getattr(module, name, None) is value for name in eager.reads)
        if not held:
            raise ModelError(
                f"{type(module).__name__} hands {name} to its attention, which its eager attention doesn't know: the "
                f"result would be another. {_LEAVE_OUT}"
            )
    for option in _ELSEWHERE:
        if getattr(module, option, False):
            raise ModelError(f"{type(module).__name__} with {option}=True computes its attention apart. {_LEAVE_OUT}")


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
        config: Any = config_of(module)
        if config is not None:
            config._attn_implementation = IMPLEMENTATION
