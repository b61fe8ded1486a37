"""Applying transforms to a block: what they ask about channels is gathered, their factors are moved between weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nybble.calibration.watch import Batches, channel_maxima
from nybble.core.errors import ModelError
from nybble.models.adapter import Adapter, LinearFold, NormFold, feeding_rows
from nybble.nn.kinds import matrix_at, values_at
from nybble.transforms import Channel, Transform


def folds_for(transform: Transform, adapter: Adapter, block: nn.Module, config: Any) -> list[NormFold | LinearFold]:
    """The pairs of a block that a transform works on."""
    pairs: list[NormFold | LinearFold] = [
        *adapter.norm_folds_of(block, config),
        *adapter.linear_folds_of(block, config),
    ]
    return [fold for fold in pairs if transform.takes(fold)]


def check_folds(name: str, transform: Transform, adapter: Adapter, model: Any) -> None:
    """Raise ModelError, with the adapter's reasons, where a transform finds nothing to work on in the whole model."""
    if any(folds_for(transform, adapter, block, model.config) for block in adapter.blocks_of(model)):
        return
    reasons = "; ".join(adapter.limits_of(model.config)) or "its adapter lists no such pair"
    raise ModelError(f"transform {name!r} finds no pair of weights to work on in this model: {reasons}.")


def transform_block(
    block: nn.Module,
    transforms: Sequence[Transform],
    adapter: Adapter,
    config: Any,
    originals: dict[str, Tensor],
    batches: Batches,
) -> None:
    """Rewrite a block in place, one transform after the other.

    Args:
        block: with real weights.
        transforms: in order.
        adapter: knows the pairs.
        config: the model's.
        originals: the block's parameters in the source's own precision, by name; changed along with the block.
        batches: the block's inputs.
    """
    for transform in transforms:
        folds = folds_for(transform, adapter, block, config)
        readers = {_reader(block, fold): fold for fold in folds}
        largest = channel_maxima(block, list(readers), batches)
        for name, fold in readers.items():
            if name in largest:
                _apply(block, fold, transform, config, originals, largest[name])


def _reader(block: nn.Module, fold: NormFold | LinearFold) -> str:
    """A module whose input is the channels (fused experts are parameters, with a router beside them)."""
    modules = dict(block.named_modules())
    return next(name for name in fold.readers if name in modules) if isinstance(fold, NormFold) else fold.second


def _apply(
    block: nn.Module,
    fold: NormFold | LinearFold,
    transform: Transform,
    config: Any,
    originals: dict[str, Tensor],
    largest: Tensor,
) -> None:
    weights = _Weights(block, originals)
    behind = fold.readers if isinstance(fold, NormFold) else (fold.second,)
    read = [weights.matrix(name) for name in behind]
    rows = None if isinstance(fold, NormFold) else feeding_rows(fold, config, len(largest)).to(largest.device)
    before = None if rows is None or isinstance(fold, NormFold) else weights.matrix(fold.first)[rows]
    factor = transform.factor(Channel(fold=fold, largest=largest, before=before, behind=read))
    if isinstance(fold, NormFold):
        factor = weights.divide_norm(fold, factor)
    else:
        assert rows is not None
        factor = weights.divide_rows(fold.first, _one_a_row(factor, rows), rows)
    for name, matrix in zip(behind, read, strict=True):
        weights.put_matrix(name, matrix * factor)


def _one_a_row(factor: Tensor, rows: Tensor) -> Tensor:
    """The largest factor among the channels that one row feeds (grouped-query attention), for each channel."""
    most = factor.new_zeros(int(rows.max()) + 1).scatter_reduce_(0, rows, factor, "amax")
    return most[rows]


class _Weights:
    """The weights of a block in float32, read from and written to both the model and the source's precise copies."""

    def __init__(self, block: nn.Module, originals: dict[str, Tensor]) -> None:
        self.block, self.originals = block, originals

    def matrix(self, name: str) -> Tensor:
        """A linear layer's weight, [rows, columns]; of fused experts [experts, rows, columns]."""
        return matrix_at(self.block, name, lambda full: self._get(full, self.block.get_parameter(full)))

    def put_matrix(self, name: str, value: Tensor) -> None:
        """Inverse of :meth:`matrix`."""
        for full, tensor in values_at(self.block, name, value).items():
            self._put(full, tensor)

    def divide_norm(self, fold: NormFold, factor: Tensor) -> Tensor:
        """Divide a norm's output by ``factor``; returns by how much it really was, its weights being rounded."""
        name = f"{fold.norm}.weight"
        live = self.block.get_parameter(name)
        old = self._get(name, live) + fold.offset
        new = (old / factor - fold.offset).to(live.dtype).float()
        really = torch.where((new + fold.offset != 0) & (old != 0), old / (new + fold.offset), torch.ones_like(old))
        new = torch.where(really == 1, old - fold.offset, new)
        self._put(name, new)
        self._divide_bias(fold.norm, really)
        return really

    def divide_rows(self, name: str, factor: Tensor, rows: Tensor) -> Tensor:
        """Divide those rows of a linear layer that feed channels; ``factor`` is one a channel."""
        matrix = self.matrix(name).clone()
        by = matrix.new_ones(len(matrix))
        by[rows] = factor
        self.put_matrix(name, matrix / by[:, None])
        self._divide_bias(name, by)
        return factor

    def _divide_bias(self, name: str, by: Tensor) -> None:
        bias = getattr(self.block.get_submodule(name), "bias", None)
        if isinstance(bias, Tensor):
            self._put(f"{name}.bias", self._get(f"{name}.bias", bias) / by)

    def _get(self, name: str, live: Tensor) -> Tensor:
        found = self.originals.get(name)
        return (live.detach() if found is None else found.to(live.device)).float()

    def _put(self, name: str, value: Tensor) -> None:
        live = self.block.get_parameter(name)
        live.data = value.to(live.dtype).contiguous()
        if name in self.originals:
            self.originals[name] = value.contiguous()
