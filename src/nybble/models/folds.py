"""Pairs of a block's layers between which factors move, or channels rotate, without a change in float; and their rows.

They are data, which a family's :class:`~nybble.models.family.Adapter` lists; :mod:`nybble.calibration.folds` uses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Rows = Literal["all", "value_heads", "last_third", "third_of_each_head"]
Conditions = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class NormFold:
    """A norm and everything that reads its output, so a factor can move from one to the others.

    The norm multiplies channel c by ``offset + weight[c]`` (and adds ``bias[c]``): dividing both by s and multiplying
    input channel c of every reader by s changes nothing in float.

    ``readers``: names in the block; each is a module with a ``weight`` or a fused 3-D parameter. ``when``: config
    attributes that must have these values, else the norm's output also goes elsewhere and the pair is off.
    """

    norm: str
    readers: tuple[str, ...]
    offset: float = 0.0
    when: Conditions = ()


@dataclass(frozen=True, kw_only=True)
class LinearFold:
    """Two linears with only a per-channel (or positively homogeneous) step between them.

    Output rows of ``first`` against input channels of ``second``; ``rows`` says which row feeds which channel
    (:func:`feeding_rows`). ``heads``: attention is what lies between, which mixes tokens and leaves the channels of a
    head alone: inside a head they may be rotated and permuted, not from head to head. ``gates``: layers whose outputs
    meet those of ``first`` channel by channel, so that their rows are permuted along.
    """

    first: str
    second: str
    rows: Rows = "all"
    when: Conditions = ()
    heads: bool = False
    gates: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class QueryKeyFold:
    """Two linears whose outputs attention multiplies with each other: a channel of one over s, of the other times s.

    ``rows``: where queries and keys are among the rows, as in :class:`LinearFold`; ``value_heads``: several heads of
    queries may read one of keys. ``rotary``: a rotary embedding lies between, which mixes channel i of a head with
    channel i plus half of what it rotates: the two share a factor. ``unless``: modules of the block that would lie
    between, too, and are no such step (norms of queries and keys); with one of them the pair is off.
    """

    query: str
    key: str
    rows: Rows = "all"
    rotary: bool = False
    unless: tuple[str, ...] = ()


ROTARY_QUERY_KEY = QueryKeyFold(
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    rows="value_heads",
    rotary=True,
    unless=("self_attn.q_norm", "self_attn.k_norm"),
)
"""Of llama and all that call their layers as it does."""


def holds(when: Conditions, config: PreTrainedConfig) -> bool:
    """Whether the config has all these values."""
    return all(getattr(config, key, None) == value for key, value in when)


def feeding_rows(fold: LinearFold, config: PreTrainedConfig, channels: int) -> Tensor:
    """Which output row of ``fold.first`` feeds each input channel of ``fold.second``.

    Args:
        fold: the pair.
        config: the model's, for its heads.
        channels: number of input channels of ``second``.

    Returns:
        int64 ``[channels]``. With grouped-query attention several channels name the same row: a factor must be one per
        row, and is spread over the channels by this index.
    """
    index = torch.arange(channels)
    if fold.rows == "all":
        return index
    if fold.rows == "last_third":  # one projection for [q | k | v]
        return index + 2 * channels
    heads: int = config.num_attention_heads
    width = channels // heads
    head, within = index // width, index % width
    if fold.rows == "third_of_each_head":  # [q0 | k0 | v0 | q1 | k1 | v1 | ...]
        return head * 3 * width + 2 * width + within
    kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
    return head // (heads // kv_heads) * width + within


def query_key_rows(
    fold: QueryKeyFold, config: PreTrainedConfig, queries: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Which rows make the channels of queries and keys, and which free factor each has.

    Args:
        fold: the pair.
        config: the model's, for its heads and for how much of each its rotary embedding rotates.
        queries: rows of ``fold.query``.

    Returns:
        Of queries and of keys (rows, units): int64 [channels] each. Channel by channel of a key head, in all query
        heads that read it, the unit is one; so it is of the two that a rotary embedding mixes.
    """
    heads: int = config.num_attention_heads
    kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
    kv_heads = heads if fold.rows != "value_heads" else kv_heads
    fused = fold.rows not in ("all", "value_heads")
    width = queries // heads // (3 if fused else 1)
    within = torch.arange(width)
    unit = within
    if fold.rotary:
        half = int(width * _rotated(config)) // 2
        unit = torch.where(within < 2 * half, within % max(1, half), within - half)
    per_head = int(unit.max()) + 1

    def side(many: int, offset: int) -> tuple[Tensor, Tensor]:
        head = torch.arange(many)[:, None]
        if fold.rows == "third_of_each_head":
            rows = head * 3 * width + offset * width + within
        else:
            rows = head * width + within + (offset * heads * width if fold.rows == "last_third" else 0)
        return rows.flatten(), (head // (many // kv_heads) * per_head + unit).flatten()

    return side(heads, 0), side(kv_heads, int(fused))


def _rotated(config: PreTrainedConfig) -> float:
    """The share of a head's channels that a rotary embedding rotates."""
    found = getattr(config, "rope_parameters", None) or {}
    share: float = found.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return share
