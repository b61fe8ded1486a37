"""What ``torch.compile`` sees of a quantized cache: one operator that rounds tokens, one that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from nybble.kv_format import tokens_a_scale
from nybble.nn.compiled import quantizer_of
from nybble.nn.kv_layout import own, rows_to_qtensor, skeleton_of, to_rows
from nybble.nn.operands import check_floats
from nybble.qtensor.block import BlockQTensor


@torch.library.custom_op("nybble::store_tokens", mutates_args=(), schema="(Tensor x, str line) -> Tensor[]")
def store_tokens(x: Tensor, line: str) -> list[Tensor]:
    """Keys or values in few bits.

    Args:
        x: [batch, heads, tokens, width], float32, bfloat16 or float16.
        line: of a quantizer with scales within a token; or along tokens, whose blocks divide them.

    Returns:
        [batch, heads, tokens, ...] each (scales along tokens: a row a block): what
        :func:`nybble.nn.kv_layout.to_rows` has, named as :func:`row_names` says.
    """
    check_floats("store_tokens", x)
    return [own(t) for t in to_rows(quantizer_of(line).quantize(x)).values()]


@store_tokens.register_fake
def _(x: Tensor, line: str) -> list[Tensor]:
    check_floats("store_tokens", x)
    rows = _rows_of_one(line, int(x.shape[3]))
    batch, heads, tokens, _ = x.shape
    span = tokens_a_scale(quantizer_of(line))
    each = [(batch, heads, tokens if r.shape[2] == span else tokens // span, r.shape[3]) for r in rows.values()]
    return [x.new_empty(shape, dtype=row.dtype) for shape, row in zip(each, rows.values(), strict=True)]


@torch.library.custom_op(
    "nybble::read_tokens",
    mutates_args=(),
    schema="(Tensor[] rows, str names, str line, Tensor newest) -> Tensor",
)
def read_tokens(rows: Sequence[Tensor], names: str, line: str, newest: Tensor) -> Tensor:
    """Keys or values [batch, heads, tokens, width] of the dtype of ``newest``, which are the last of them.

    Args:
        rows: of :func:`store_tokens`; at least one.
        names: theirs, with spaces between.
        line: of their quantizer.
        newest: [batch, heads, 0 or more, width], float.
    """
    found = stored_rows(rows, names, line, newest)
    assert found is not None
    values = found.dequantize(newest.dtype)
    return torch.cat([values, newest], 2) if newest.shape[2] else values


@read_tokens.register_fake
def _(rows: Sequence[Tensor], names: str, line: str, newest: Tensor) -> Tensor:
    batch, heads, recent, width = newest.shape
    return newest.new_empty((batch, heads, rows[0].shape[2] + recent, width))


def stored_rows(rows: Sequence[Tensor], names: str, line: str, newest: Tensor) -> BlockQTensor | None:
    """The QTensor [batch, heads, tokens, width] over some rows; None where all are float."""
    if not line or not rows:
        return None
    return rows_to_qtensor(dict(zip(names.split(), rows, strict=True)), _skeleton(line, newest.shape[3]))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def row_names(line: str, width: int) -> str:
    """Of what :func:`store_tokens` returns, with spaces between."""
    return " ".join(_rows_of_one(line, width))


@lru_cache(maxsize=1024)
def _rows_of_one(line: str, width: int) -> dict[str, Tensor]:
    quantizer = quantizer_of(line)
    return to_rows(quantizer.quantize(torch.zeros(1, 1, tokens_a_scale(quantizer), width)))


@lru_cache(maxsize=1024)
def _skeleton(line: str, width: int) -> BlockQTensor:
    return skeleton_of(quantizer_of(line), width)
