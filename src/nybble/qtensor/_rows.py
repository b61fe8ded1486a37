"""Some rows of a quantized matrix as a quantized matrix of their own: the same codes, the same scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import GranularityError
from nybble.granularity import Granularity
from nybble.packing import get_layout
from nybble.qtensor import Factored, Inverse, QTensor, ScaleLike, broadcasts, from_spec
from nybble.qtensor.block import BlockQTensor


def split_rows(tensor: QTensor, sizes: Sequence[int]) -> list[QTensor]:
    """A matrix cut into neighbouring rows.

    Args:
        tensor: [sum(sizes), columns].
        sizes: rows of each part.

    Raises:
        GranularityError: as :func:`take_rows`.
    """
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [take_rows(tensor, range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


def take_rows(tensor: QTensor, rows: Sequence[int]) -> BlockQTensor:
    """Rows of a matrix, in the order given; what all rows share (a scale of the tensor, of its scales) is kept.

    Args:
        tensor: [rows, columns], on any device.
        rows: which, each at most once.

    Raises:
        GranularityError: a scale that belongs to some of them and to others.
    """
    if not isinstance(tensor, BlockQTensor) or len(tensor.shape) != 2:
        raise GranularityError(f"a {tensor.kind} tensor {list(tensor.shape)} has no rows that can be taken apart.")
    count = tensor.shape[0]
    if list(rows) == list(range(count)):
        return tensor
    shape = (len(rows), *tensor.shape[1:])
    codes = get_layout(tensor.layout).pack(_picked(tensor.unpacked(), rows).reshape(-1), tensor.format.bits)
    params = tensor.params
    cut = _Cut(tensor.granularity, tensor.shape, shape, list(rows))
    return replace(
        tensor,
        shape=shape,
        codes=codes,
        params=replace(
            params,
            scale=None if params.scale is None else cut.scale(params.scale),
            zero_point=None if params.zero_point is None else cut.part(params.zero_point),
            offset=None if params.offset is None else cut.part(params.offset),
        ),
    )


def gathered(tensor: QTensor, ids: Tensor) -> BlockQTensor | None:
    """Rows of a matrix by their codes; no others are unpacked where a row fills whole bytes, and no GPU is waited for.

    Args:
        tensor: [rows, columns], on any device.
        ids: int64 or int32 [count], of rows, which may come several times.

    Returns:
        [count, columns]; None where the scales of a row are other rows' too.
    """
    if not isinstance(tensor, BlockQTensor) or len(tensor.shape) != 2 or tensor.layout != "dense":
        return None
    count, columns = tensor.shape
    own = tensor.granularity.scale_shape((count, columns))
    each, params = count * (math.prod(own) // max(1, count)) == math.prod(own), tensor.params
    found: dict[str, Any] = {}
    if count < 2:
        return None
    for name in ("scale", "zero_point", "offset"):
        value = getattr(params, name)
        if isinstance(value, Tensor) and value.numel() > 1:
            if not each or value.numel() != math.prod(own) or (value.ndim > 1 and value.shape[0] != count):
                return None
            rows = value.reshape(count, -1)[ids]
            found[name] = rows.reshape(-1) if value.ndim == 1 else rows.reshape(-1, *value.shape[1:])
        elif isinstance(value, BlockQTensor) and math.prod(value.shape) > 1:
            found[name] = gathered(value, ids) if value.shape[:1] == (count,) and each else None
            if found[name] is None:
                return None
        elif not (value is None or isinstance(value, Tensor | BlockQTensor)):
            return None
    if columns * tensor.format.bits % 8:
        codes = get_layout(tensor.layout).pack(tensor.unpacked()[ids].reshape(-1), tensor.format.bits)
    else:
        codes = tensor.codes.view(count, -1)[ids].reshape(-1)
    return replace(tensor, shape=(len(ids), columns), codes=codes, params=replace(params, **found))


def _picked(value: Tensor, rows: Sequence[int]) -> Tensor:
    return value[torch.as_tensor(list(rows), dtype=torch.int64, device=value.device)]


class _Cut:
    """What becomes of parameters when rows are taken.

    Args:
        granularity: of the matrix. before, after: its shape. rows: which stay.
    """

    def __init__(
        self, granularity: Granularity, before: tuple[int, ...], after: tuple[int, ...], rows: list[int]
    ) -> None:
        self.granularity, self.before, self.after, self.rows = granularity, before, after, rows

    def scale(self, scale: ScaleLike) -> ScaleLike:
        if isinstance(scale, Inverse):
            return Inverse(self._plain(scale.divisor))
        if isinstance(scale, Factored):
            return Factored(tuple(self._factor(factor) for factor in scale.factors), scale.combine)
        return self.part(scale)

    def _factor(self, factor: Tensor | QTensor) -> Tensor | QTensor:
        if isinstance(factor, Tensor) and broadcasts(factor.shape, self.before):
            return factor.clone() if factor.shape[0] == 1 else _picked(factor, self.rows)
        return self.part(factor)

    def part(self, value: Tensor | QTensor) -> Tensor | QTensor:
        if isinstance(value, Tensor):
            return self._plain(value)
        if math.prod(value.shape) == 1:
            return from_spec(value.spec(), {name: tensor.clone() for name, tensor in value.tensors().items()})
        if len(value.shape) != 2:
            raise GranularityError(f"'{self.granularity}' counts its scales along the whole tensor; rows share them.")
        return take_rows(value, self._groups(value.shape[0]))

    def _plain(self, value: Tensor) -> Tensor:
        if value.numel() == 1:
            return value.clone()  # what two modules share by identity is stored once
        count, blocks = self.before[0], math.prod(self.granularity.scale_shape(self.before))
        if value.ndim == 1 and blocks % count == 0 and math.prod(self.before) % blocks == 0:  # they end where rows do
            return _picked(value.view(count, -1), self.rows).reshape(-1)
        return _picked(value, self._groups(value.shape[0]))

    def _groups(self, count: int) -> list[int]:
        """Which rows of a parameter belong to the rows that are taken.

        Args:
            count: rows of the parameter.
        """
        rows, total = self.rows, self.before[0]
        if count == total:
            return rows
        wanted = self.granularity.scale_shape(self.after)[0]
        each = len(rows) // max(1, wanted)
        starts = rows[:: max(1, each)]
        whole = wanted * each == len(rows) and count * each == total and each > 0
        if not whole or any(
            start % each or rows[i * each : (i + 1) * each] != list(range(start, start + each))
            for i, start in enumerate(starts)
        ):
            raise GranularityError(
                f"'{self.granularity}': {-(-total // count)} rows share a scale, and {len(rows)} of {total} are wanted."
            )
        return [start // each for start in starts]
