"""Attention over keys and values as a cache stores them, as one operator.

``kernels/`` has versions that expand nothing. Models meet it through :class:`Stored`: what a quantized cache hands to a
model's attention in place of a tensor, where there are kernels. The implementation ``nybble-cache``, registered with
transformers, takes such keys and values apart; to everything else they are a tensor, made when it is first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from nybble.nn.attention import as_cached
from nybble.nn.kv_basis import Basis
from nybble.nn.kv_operators import read_tokens
from nybble.nn.kv_rows import TokenRows
from nybble.nn.operands import check_attention
from nybble.ops.loader import load_at_first_use

IMPLEMENTATION = "nybble-cache"
DEVICES = frozenset({"cuda"})
"""Types of devices for which there are kernels."""


@torch.library.custom_op(
    "nybble::cached_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor[] keys, str key_names, str key_line, Tensor[] values, str value_names, "
    "str value_line, Tensor newest_keys, Tensor newest_values, Tensor? mask, float scaling) -> Tensor",
)
def cached_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    key_names: str,
    key_line: str,
    values: Sequence[Tensor],
    value_names: str,
    value_line: str,
    newest_keys: Tensor,
    newest_values: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """``softmax(scaling * query keys^T + mask) values``.

    Args:
        query: [batch, heads, queries, width]; key heads divide heads, and neighbours share one.
        keys: of :meth:`nybble.nn.kv_rows.TokenRows.rows`: [batch, key heads, tokens, ...] each; none where all are
            float.
        key_names: theirs, with spaces between.
        key_line: of their quantizer; empty where all are float.
        values: as the keys.
        value_names: as theirs.
        value_line: as theirs.
        newest_keys: [batch, key heads, 0 or more, width], float, behind the stored ones.
        newest_values: [batch, key heads, 0 or more, width of values].
        mask: None, or bool (what is seen) or float (added to the scores), and broadcasts to
            [batch, heads, queries, tokens].
        scaling: of the scores.

    Returns:
        [batch, heads, queries, width of values], of the dtype of the query. A kernel adds up in float32 and rounds
        neither scales of whole tokens nor scores to it, so its result differs from the exact one by no more than this.
    """
    check_attention("cached_attention", query, keys, values, (newest_keys, newest_values), mask)
    k = _read(keys, key_names, key_line, newest_keys)
    v = _read(values, value_names, value_line, newest_values)
    return functional.scaled_dot_product_attention(query, k, v, mask, scale=scaling, enable_gqa=True).contiguous()


@cached_attention.register_fake
def _(query: Tensor, *others: Any) -> Tensor:
    check_attention("cached_attention", query, others[0], others[3], (others[6], others[7]), others[8])
    return query.new_empty((*query.shape[:3], others[7].shape[3]))


def _read(rows: Sequence[Tensor], names: str, line: str, newest: Tensor) -> Tensor:
    if not line or not rows:
        return newest
    found: Tensor = read_tokens(rows, names, line, newest)
    return found


load_at_first_use([cached_attention])


class Stored(Tensor):
    """Keys or values [batch, heads, tokens, width] of a cache: a tensor to whoever calculates with it.

    Args:
        rows: of one layer; what is appended later is no part of this.
    """

    rows: tuple[list[Tensor], str, str, Tensor]
    """As the operator takes them: in the basis in which they were rounded, the newest tokens too."""
    basis: Basis | None
    newest: Tensor

    @staticmethod
    def __new__(cls, rows: TokenRows) -> Stored:
        """Of the rows as they are now."""
        newest = rows.newest
        shape = (*newest.shape[:2], rows.tokens, newest.shape[3])
        make: Any = torch.Tensor._make_wrapper_subclass
        made: Stored = make(cls, shape, dtype=newest.dtype, device=newest.device)
        found = rows.rows()
        made.basis, made.newest = rows.basis, newest
        inside = newest if rows.basis is None else rows.basis.into(newest).to(newest.dtype)
        made.rows = (list(found.values()), " ".join(found), rows.line, inside)
        return made

    def read(self) -> Tensor:
        """The values, expanded."""
        if self.basis is None or not self.rows[0]:
            return _read(*self.rows[:3], self.newest)
        rounded = self.basis.back(_read(*self.rows[:3], self.newest[:, :, :0].float()))
        return torch.cat([rounded.to(self.newest.dtype), self.newest], 2)

    def turned(self, x: Tensor, back: bool = False) -> Tensor:
        """Queries [batch, heads, queries, width] in the basis of these heads, or attention's results back from it."""
        if self.basis is None:
            return x
        by_head = x.reshape(x.shape[0], self.shape[1], -1, x.shape[3])
        found = self.basis.back(by_head) if back else self.basis.into(by_head)
        return found.to(x.dtype).reshape(x.shape)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Stored({list(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        read = tree_map_only(Stored, Stored.read, (args, kwargs or {}))
        return func(*read[0], **read[1])


def attend(query: Tensor, key: Stored, value: Stored, mask: Tensor | None, scaling: float) -> Tensor:
    """:func:`cached_attention` over what a cache holds, in whatever basis: queries are turned, not keys."""
    rows = (*key.rows[:3], *value.rows[:3], key.rows[3], value.rows[3])
    found: Tensor = cached_attention(key.turned(query), *rows, mask, scaling)
    return value.turned(found, back=True)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, Tensor | None]:
    """Transformers' attention by torch (``sdpa``), but over :class:`Stored` keys and values by one operator.

    Arguments and result are those of transformers' attention functions.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    key, value = as_cached(module, key, value)
    plain = not others.get("dropout") and others.get("s_aux") is None and others.get("position_bias") is None
    if not (isinstance(key, Stored) and isinstance(value, Stored) and plain and query.shape[2] == 1):
        key, value = (t.read() if isinstance(t, Stored) else t for t in (key, value))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    scaling = others.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return attend(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None


def use_cached_attention(model: Any, on: bool) -> None:
    """Let a model whose attention is torch's read quantized caches as they lie; or not."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    from nybble.nn.config import config_of

    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    before, after = ("sdpa", IMPLEMENTATION) if on else (IMPLEMENTATION, "sdpa")
    if not getattr(model, "_supports_attention_backend", False):  # it would look for the name "sdpa" itself
        return
    for module in model.modules():
        config: Any = config_of(module)
        if config is not None and getattr(config, "_attn_implementation", None) == before:
            config._attn_implementation = after
