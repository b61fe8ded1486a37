"""What operators take, checked before any kernel sees it: dtypes, shapes and devices that kernels trust."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import UsageError

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
"""Of what is multiplied; kernels have the first three, float64 goes the readable way."""


@lru_cache(maxsize=65536)
def record_of(key: str) -> dict[str, Any]:
    """What a key of :func:`nybble.nn.compiled.key_of` holds: ``spec`` and ``names``.

    Raises:
        UsageError: it is none.
    """
    try:
        found = json.loads(key)
        if isinstance(found["spec"], dict) and isinstance(found["names"], list):
            return dict(found)
    except (ValueError, LookupError, TypeError):
        pass
    raise UsageError(f"{key!r:.60} describes no packed weight; nybble.nn.compiled.key_of makes what does.")


def check_weight(name: str, like: Tensor, tensors: Sequence[Tensor], key: str, shape: Sequence[int]) -> None:
    """Whether some tensors are those of a key, of a matrix, and where ``like`` is.

    Raises:
        UsageError: names the operator, what came and what has to.
    """
    record = record_of(key)
    if len(tensors) != len(record["names"]):
        raise UsageError(f"{name}: {len(tensors)} tensors of a weight that has {', '.join(record['names'])}.")
    if len(shape) != 2 or list(shape) != record["spec"].get("shape", list(shape)):
        raise UsageError(
            f"{name}: a weight {record['spec'].get('shape', '[rows, columns]')} that is said to be {list(shape)}."
        )
    for tensor in tensors:
        if tensor.device != like.device:
            raise UsageError(f"{name}: {list(like.shape)} on {like.device} and a weight on {tensor.device}; move one.")


def check_product(
    name: str, x: Tensor, tensors: Sequence[Tensor], key: str, shape: Sequence[int], bias: Tensor | None, *_: Any
) -> None:
    """The arguments of :func:`nybble.nn.products.reference`, and of what else begins with these.

    Raises:
        UsageError: names the operator, what came and what has to.
    """
    check_weight(name, x, tensors, key, shape)
    check_floats(name, x)
    n, k = shape
    if not x.dim() or x.shape[-1] != k:
        raise UsageError(f"{name}: x {list(x.shape)} and a weight {[n, k]}: the last sides differ.")
    if bias is not None and (bias.shape != (n,) or bias.dtype != x.dtype or bias.device != x.device):
        raise UsageError(
            f"{name}: a bias {list(bias.shape)} in {bias.dtype} on {bias.device}; it has to be {[n]} in {x.dtype} on "
            f"{x.device}, as x is."
        )


def check_rows(
    name: str, ids: Tensor, tensors: Sequence[Tensor], key: str, shape: Sequence[int], dtype: torch.dtype
) -> None:
    """The arguments of :func:`nybble.nn.products.rows_reference`, but not the numbers in ``ids``.

    Raises:
        UsageError: names the operator, what came and what has to.
    """
    check_weight(name, ids, tensors, key, shape)
    if ids.dtype not in (torch.int64, torch.int32):
        raise UsageError(f"{name}: ids in {ids.dtype}; they are int64 or int32.")
    if dtype not in FLOATS:
        raise UsageError(f"{name}: rows in {dtype}; they come in float32, bfloat16, float16 or float64.")


def check_floats(name: str, x: Tensor, *_: Any) -> None:
    """Whether ``x`` has rows in a dtype of :data:`FLOATS`.

    Raises:
        UsageError: names the operator, and what came.
    """
    if x.dtype not in FLOATS:
        raise UsageError(f"{name}: x in {x.dtype}; it takes float32, bfloat16, float16 and float64.")
    if not x.dim():
        raise UsageError(f"{name}: x is a single number; it takes rows, [..., columns].")


def check_static(name: str, line: str, static: bool, parts: Sequence[Tensor], names: str, device: torch.device) -> None:
    """Whether static parameters of activations, and only theirs, are there: one value each, on ``device``.

    Raises:
        UsageError: names the operator, the line and what came.
    """
    fit = bool(parts) == static and len(parts) == len(names.split())
    if not fit or any(part.numel() != 1 or part.device != device for part in parts):
        raise UsageError(
            f"{name}: {len(parts)} static parameters ({names or 'none'}) of {line}; a static quantizer, and only that, "
            f"has them, one value each, on {device}."
        )


def check_attention(
    name: str,
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    newest: tuple[Tensor, Tensor],
    mask: Tensor | None,
) -> None:
    """The tensors of :func:`nybble.nn.cached_attention.cached_attention`.

    Raises:
        UsageError: names the operator, what came and what has to.
    """
    check_floats(name, query)
    given = (query, *newest)
    if any(t.dim() != 4 or t.dtype != query.dtype for t in given):
        said = ", ".join(f"{list(t.shape)} in {t.dtype}" for t in given)
        raise UsageError(f"{name}: query, keys and values are [batch, heads, tokens, width] of one dtype; got {said}.")
    batch, heads, queries, width = query.shape
    here = newest[0].shape[:2]
    alike = here[0] == batch and here[1] > 0 and heads % here[1] == 0 and newest[0].shape[3] == width
    tokens = []
    for rows, behind in zip((keys, values), newest, strict=True):
        stored = rows[0].shape[2] if rows else 0
        alike = alike and behind.shape[:2] == here and all(t.shape[:3] == (*here, stored) for t in rows)
        tokens.append(behind.shape[2] + stored)
    if not alike or tokens[0] != tokens[1]:
        raise UsageError(
            f"{name}: query {list(query.shape)}, newest keys {list(newest[0].shape)} and values "
            f"{list(newest[1].shape)}, {tokens[0]} and {tokens[1]} tokens in all: batch, width or tokens differ, or "
            "key heads don't divide heads."
        )
    wanted = (batch, heads, queries, tokens[0])
    if mask is not None:
        fits = 2 <= mask.dim() <= 4 and all(a in (1, b) for a, b in zip(mask.shape[::-1], wanted[::-1], strict=False))
        if not fits or not (mask.dtype == torch.bool or mask.dtype in FLOATS):
            raise UsageError(
                f"{name}: a mask {list(mask.shape)} in {mask.dtype}; it is bool or float, and broadcasts to "
                f"{list(wanted)}."
            )
    for tensor in (*keys, *values, *newest, *(() if mask is None else (mask,))):
        if tensor.device != query.device:
            raise UsageError(f"{name}: a query on {query.device} beside a tensor on {tensor.device}; move one.")
