"""A KV cache in few bits, as a transformers ``Cache``: any dynamic quantizer, keys and values apart.

    cache = QuantizedCache(model.config, keys="bfp12", values="int8 token")
    model.generate(**inputs, cache=cache)                # past_key_values=cache before transformers 5.24
    cache.nbytes()

What is read back is what was stored: a prompt's own queries already meet the rounded keys and values, so the text may
be cached at once, in chunks or token by token, and the same keys and values are stored in the same bytes. (Between the
layers torch may add up in another order when the chunks differ, as in float.) With ``residual_length`` the newest
tokens stay in float until others have come, so how a prompt is cut decides which queries meet them so; KIVI (Liu et al.
2024, arXiv:2402.02750) and transformers' own quantized cache share that. Unlike those a stored token is never rounded
again: scales lie along the head's width, or, for KIVI's keys (``int2 block=32x1``), along blocks of tokens that are
rounded when they are full. A rotation or order of the channels is undone when they are read
(:mod:`nybble.nn.kv_basis`).

Keys are cached behind the rotary embedding, where a model has one; LLM-QAT (Liu et al. 2023, arXiv:2305.17888) rounds
in front of it, with one scale for all heads. Its gradient is kept: the tokens of a call pass theirs on unchanged
(straight through), those of earlier calls have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from nybble.core.errors import ModelError, UsageError
from nybble.kv_format import KVFormat
from nybble.nn.cached_attention import DEVICES, Stored, attend
from nybble.nn.kv_basis import Basis, Orders, Rotated, Sorted
from nybble.nn.kv_rows import TokenRows
from nybble.qtensor import QTensor
from nybble.quantizer import Quantizer

FLOAT = KVFormat(keys=None, values=None)


class QuantizedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The keys and values of one layer, [batch, heads, tokens, head width] each.

    Args:
        kv: how they are stored.
        orders: of the channels of the sides that are sorted.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, kv: KVFormat, orders: Orders | None = None) -> None:
        self.kv, self.orders = kv, orders or {}
        self.is_initialized = False
        self._sides: tuple[TokenRows, ...] = ()

    # transformers reads these two of a filled cross-attention cache
    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """All stored keys, in the model's dtype; None before the first token."""
        return self._sides[0].read() if self._sides else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """All stored values, in the model's dtype; None before the first token."""
        return self._sides[1].read() if self._sides else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Get ready for keys and values of these shapes and dtypes; nothing is stored yet."""
        self.dtype, self.device = key_states.dtype, key_states.device
        states = {"keys": key_states, "values": value_states}
        self._sides = tuple(
            self._rows(side, like, line) for (side, like), line in zip(states.items(), self.kv.lines, strict=True)
        )
        self.is_initialized = True

    def _rows(self, side: str, like: Tensor, line: str) -> TokenRows:
        quantizer: Quantizer | None = getattr(self.kv, side)
        basis: Basis | None = Rotated.of(like.shape[3], like.device) if side in self.kv.rotate else None
        if side in self.kv.sort:
            if side not in self.orders:
                raise UsageError(
                    f"sort={side}: the order comes from a model's weights, so let the model make its cache "
                    "(use_quantized_cache)."
                )
            basis = Sorted.of(self.orders[side], like.device)
        return TokenRows(quantizer, self.kv.residual, like, line, self.kv.sink, basis)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store more tokens; returns all that are stored, as they are read back (on a GPU, when they are used)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        found = []
        for side, states in zip(self._sides, (key_states, value_states), strict=True):
            side.append(states)
            whole = self._as_stored(states)
            found.append(Stored(side) if whole else _straight_through(states, side.read()))
        return found[0], found[1]

    def _as_stored(self, states: Tensor) -> bool:
        """Whether one more token is met by a query that reads the rows as they lie; no compiler follows that."""
        if torch.compiler.is_compiling():
            return False
        grad = torch.is_grad_enabled() and states.requires_grad
        plain = all(side.plain for side in self._sides)
        return states.shape[2] == 1 and states.device.type in DEVICES and self.kv.stores and plain and not grad

    def attend(self, query: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
        """Attention over all that is stored; see :func:`nybble.nn.cached_attention.cached_attention`."""
        if not all(side.plain for side in self._sides):
            k, v = (side.read() for side in self._sides)
            return functional.scaled_dot_product_attention(query, k, v, mask, scale=scaling, enable_gqa=True)
        return attend(query, Stored(self._sides[0]), Stored(self._sides[1]), mask, scaling)

    def get_seq_length(self) -> int:
        """How many tokens were cached."""
        return self._sides[0].tokens if self._sides else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that queries of this length meet, and the first one's position."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self._sides, self.is_initialized = (), False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, as many as the negative of ``tokens_to_remove``."""
        if tokens_to_remove > 0:
            raise UsageError(f"crop({tokens_to_remove}): give the tokens to remove as a negative number.")
        self._drop_newest(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take these sequences of the batch, in this order."""
        for side in self._sides:
            side.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take these sequences of the batch, in this order."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence of the batch so many times, one behind the other."""
        for side in self._sides:
            side.select(torch.arange(side.newest.shape[0]).repeat_interleave(repeats))

    def offload(self) -> None:
        """Refused: it would be moved for every token."""
        raise UsageError("a quantized KV cache stays on the model's device; leave offloading out.")

    def prefetch(self) -> None:
        """Refused, as :meth:`offload`."""
        self.offload()

    def qtensors(self) -> dict[str, QTensor]:
        """What is stored in few bits: ``keys`` and ``values``, without the newest tokens of a residual."""
        found = {name: side.qtensor() for name, side in zip(("keys", "values"), self._sides, strict=False)}
        return {name: stored for name, stored in found.items() if stored is not None}

    def tensors(self) -> dict[str, Tensor]:
        """What takes memory, by name: ``keys.codes``, ``keys.scale``, ``keys.newest`` ..."""
        sides = zip(("keys", "values"), self._sides, strict=False)
        return {f"{name}.{part}": tensor for name, side in sides for part, tensor in side.tensors().items()}

    def _drop_newest(self, count: int) -> None:
        for side in self._sides:  # both or neither
            side.check_drop(count)
        for side in self._sides:
            side.drop_newest(count)


class QuantizedSlidingLayer(QuantizedLayer):  # type: ignore[no-untyped-call]
    """The same for a layer that attends to the last ``window`` tokens, its own included: ``window - 1`` are stored.

    Args:
        kv: how they are stored. window: in tokens. orders: as of :class:`QuantizedLayer`.
    """

    is_sliding = True

    def __init__(self, kv: KVFormat, window: int, orders: Orders | None = None) -> None:
        super().__init__(kv, orders)
        self.sliding_window, self.cumulative_length, self.record_past = window, 0, False

    def activate_past_recording(self) -> None:
        """Keep what leaves the window until the next :meth:`crop`, so that it can go back (assisted generation)."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store more tokens; returns those that some query of this call sees, as they are read back."""
        self.cumulative_length += key_states.shape[2]
        keys, values = super().update(key_states, value_states)
        if not self.record_past:
            self._trim()
        seen = self.sliding_window - 1 + key_states.shape[2]
        return keys[:, :, -seen:], values[:, :, -seen:]

    def get_seq_length(self) -> int:
        """How many tokens were cached, those that left the window included."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that queries of this length meet, and the first one's position."""
        past = min(self.cumulative_length, self.sliding_window - 1)
        return past + query_length, self.cumulative_length - past

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.cumulative_length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, and what has left the window.

        Raises:
            UsageError: tokens that are needed again have left the window (``activate_past_recording`` keeps them).
        """
        length = max(0, self.cumulative_length + tokens_to_remove)
        stored = sum(side.tokens for side in self._sides[:1])
        if max(0, stored + tokens_to_remove) < min(length, self.sliding_window - 1):
            raise UsageError(
                f"crop({tokens_to_remove}): tokens that left the window of {self.sliding_window} would be needed "
                "again; call activate_past_recording() before they do."
            )
        super().crop(tokens_to_remove)
        self.cumulative_length = length
        self._trim()

    def _trim(self) -> None:
        for side in self._sides:
            side.drop_oldest(side.tokens - (self.sliding_window - 1))


class QuantizedCache(DynamicCache):
    """A cache for one model: quantized layers where it has attention, transformers' own where it has other states.

    Args:
        config: the model's. Sliding windows and layers without attention (linear, convolutions, shared) are read there.
        keys: quantizer, or its line, of the keys; None leaves them in float. values: of the values.
        residual_length: newest tokens that stay in float.

    Raises:
        SchemeError: a quantizer that a cache can't have, see :class:`nybble.kv_format.KVFormat`.
        ModelError: a model with layers that cache something else beside keys and values.
    """

    def __init__(
        self,
        config: Any,
        *,
        keys: Quantizer | str | None,
        values: Quantizer | str | None,
        residual_length: int = 0,
    ) -> None:
        sides = {"keys": keys, "values": values}
        made = {name: None if q is None else Quantizer(q) for name, q in sides.items()}
        self._fill(config, KVFormat(keys=made["keys"], values=made["values"], residual=residual_length), {})

    @classmethod
    def of(
        cls, config: Any, kv: KVFormat | Mapping[int, KVFormat], orders: Mapping[int, Orders] | None = None
    ) -> QuantizedCache:
        """A cache of one format, or of one a layer; layers that are not named cache in float. Orders are a layer's."""
        made = cls.__new__(cls)
        made._fill(config, kv, orders or {})
        return made

    def _fill(self, config: Any, kv: KVFormat | Mapping[int, KVFormat], orders: Mapping[int, Orders]) -> None:
        super().__init__(config=config)
        formats = {i: kv if isinstance(kv, KVFormat) else kv.get(i, FLOAT) for i in range(len(self.layers))}
        self.layers: list[Any] = [_layer(layer, formats[i], i, orders.get(i)) for i, layer in enumerate(self.layers)]
        if not self._quantized():
            raise ModelError("no layer of this model caches keys and values; leave its cache as it is.")

    def qtensors(self) -> dict[str, QTensor]:
        """What is stored in few bits, by name: ``0.keys``, ``0.values``, ``1.keys`` ..."""
        return {f"{i}.{name}": q for i, layer in self._quantized() for name, q in layer.qtensors().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of keys and values that takes memory, by name: ``0.keys.codes``, ``0.keys.scale`` ..."""
        return {f"{i}.{name}": t for i, layer in self._quantized() for name, t in layer.tensors().items()}

    def nbytes(self) -> int:
        """Bytes that the cached keys and values take: codes, scales, offsets, padding, and tokens left in float."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def _quantized(self) -> list[tuple[int, QuantizedLayer]]:
        return [(i, layer) for i, layer in enumerate(self.layers) if isinstance(layer, QuantizedLayer)]


def make_cache(config: Any, kv: KVFormat | Mapping[int, KVFormat], orders: Mapping[int, Orders] | None = None) -> Cache:
    """The cache of a model: of an encoder and decoder one for its own tokens and one for the encoder's, both quantized.

    The encoder's tokens are stored once and have no newest ones: none of them stays in float, but what fills no block.
    """
    own = QuantizedCache.of(config, kv, orders)
    if not config.is_encoder_decoder:
        return own
    cross = kv.of_given() if isinstance(kv, KVFormat) else {i: found.of_given() for i, found in kv.items()}
    return EncoderDecoderCache(own, QuantizedCache.of(config, cross))


def _layer(layer: Any, kv: KVFormat, index: int, orders: Orders | None) -> Any:
    """What stands for one of transformers' layers."""
    if type(layer) is DynamicSlidingWindowLayer:
        return QuantizedSlidingLayer(kv, layer.sliding_window, orders)
    if type(layer) is DynamicLayer:
        return QuantizedLayer(kv, orders)
    if isinstance(layer, CacheLayerMixin):
        raise ModelError(
            f"layer {index} of this model caches more than keys and values ({type(layer).__name__}), which can't be "
            "quantized; leave its KV cache in float."
        )
    return layer  # recurrent states, or nothing


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _straight_through(states: Tensor, read: Tensor) -> Tensor:
    """``read``, whose last tokens pass their gradient on to ``states``."""
    if not (torch.is_grad_enabled() and states.requires_grad):
        return read
    before = read.shape[2] - states.shape[2]
    last: Tensor = _StraightThrough.apply(states, read[:, :, before:])  # type: ignore[no-untyped-call]
    return torch.cat([read[:, :, :before], last], 2)
