"""The pairs of weights that transforms work on: what a pair's matrices are, and how factors move through it.

A factor goes from one weight to the other: ``norm / s`` before and ``weight * s`` behind (a norm fold), or rows of one
linear layer by ``1 / s`` and columns of the next by ``s`` (a linear fold).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nybble.calibration.block import BlockState
from nybble.calibration.watch import see_channels
from nybble.calibration.window import Window
from nybble.models.adapter import Adapter, LinearFold, NormFold, feeding_rows
from nybble.nn.kinds import matrix_at, values_at
from nybble.quantizer import Quantizer
from nybble.transforms import Rewrite, Transform

Fold = NormFold | LinearFold


def folds_of(adapter: Adapter, block: Any, config: Any) -> list[Fold]:
    """All pairs of a block."""
    return [*adapter.norm_folds_of(block, config), *adapter.linear_folds_of(block, config)]


class Matrices:
    """A block's weights as matrices [rows, columns] (of fused experts [experts, rows, columns]), by a fold's names."""

    def __init__(self, state: BlockState) -> None:
        self.state = state

    def parameters(self, name: str) -> tuple[str, ...]:
        """The parameters that a matrix is made of."""
        asked: list[str] = []

        def get(full: str) -> Tensor:
            asked.append(full)
            return self.state.raw(full)

        matrix_at(self.state.module, name, get)
        return tuple(asked)

    def bias(self, name: str) -> str | None:
        """The name of a module's bias, if it has one."""
        return f"{name}.bias" if self.state.has(f"{name}.bias") else None

    def get(self, name: str, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The matrix now, or as ``weights`` have its parameters; float32."""
        return matrix_at(self.state.module, name, self.state.get if weights is None else weights.__getitem__)

    def put(self, name: str, matrix: Tensor) -> dict[str, Tensor]:
        """What its parameters must hold for the matrix to be this one."""
        return values_at(self.state.module, name, matrix)


@dataclass(frozen=True, kw_only=True)
class Channel:
    """The channels between two weights, as a transform sees them.

    Attributes:
        fold: the pair, from the adapter.
        largest: largest magnitude that calibration saw in each channel, float32 [channels].
        before: rows of the weight that produce each channel, float32 [channels, columns]; None behind a norm.
        behind: weights that read the channels, float32 [rows, channels] each (of fused experts [experts, rows,
            channels]).
        rows: which row of the first weight feeds each channel, int64 [channels]; None behind a norm.
        quantizers: what the weights behind will be rounded to; None stays in float.
        mean: mean magnitude that calibration saw, float32 [channels].
        moment: second moment of the channels, float32 [channels, channels], where a transform asks for it.
        norm: weights of the norm before, in the dtype in which they are used; None behind a linear layer.
    """

    fold: Fold
    largest: Tensor
    before: Tensor | None
    behind: Sequence[Tensor]
    rows: Tensor | None
    quantizers: Sequence[Quantizer | None] = ()
    mean: Tensor | None = None
    moment: Tensor | None = None
    norm: Tensor | None = None

    def taken(self, factor: Tensor) -> Tensor:
        """What the weights behind are really multiplied by, if the channels are to be divided by ``factor``."""
        if self.rows is not None:
            return one_a_row(factor, self.rows)
        if self.norm is None or not isinstance(self.fold, NormFold):
            return factor
        return _divided_norm(self.norm.float(), factor, self.fold.offset, self.norm.dtype)[1]


def channels_of(window: Window, folds: Sequence[Fold], path: str, moments: bool = False) -> Iterator[Channel]:
    """What calibration and the weights say of each pair; pairs that were never run are left out.

    Args:
        window: one block.
        folds: the pairs.
        path: whose inputs.
        moments: with second moments of the channels.
    """
    rules = {target.name: target.rule.weights for target in window.block.targets}
    matrices, config = Matrices(window.block), window.calibration.config
    readers = {_reader(window.block, fold): fold for fold in folds}
    sizes = see_channels(window.block.module, list(readers), window.batches(path), moments)
    for name, fold in readers.items():
        if name not in sizes:
            continue
        seen, moment = sizes[name].largest, sizes[name].moment
        assert seen is not None
        rows = norm = None
        if isinstance(fold, NormFold):
            norm = window.block.raw(f"{fold.norm}.weight").to(_live_dtype(window.block, fold.norm))
        if isinstance(fold, LinearFold):
            rows = feeding_rows(fold, config, len(seen)).to(seen.device)  # type: ignore[arg-type]
        before = matrices.get(fold.first)[rows] if isinstance(fold, LinearFold) else None
        behind = [matrices.get(reader) for reader in behind_of(fold)]
        yield Channel(
            fold=fold, largest=seen, before=before, behind=behind, rows=rows,
            quantizers=[rules.get(reader) for reader in behind_of(fold)], mean=sizes[name].mean,
            moment=None if moment is None else moment.mean(f"{window.block.prefix}{name}"), norm=norm,
        )  # fmt: skip


def behind_of(fold: Fold) -> tuple[str, ...]:
    """Names of the weights that read the channels."""
    return fold.readers if isinstance(fold, NormFold) else (fold.second,)


def _reader(state: BlockState, fold: Fold) -> str:
    """A module whose input is the channels (fused experts are parameters, with a router beside them)."""
    modules = dict(state.module.named_modules())
    return next(name for name in fold.readers if name in modules) if isinstance(fold, NormFold) else fold.second


@dataclass(frozen=True, kw_only=True)
class Scaling(Transform):
    """A transform that moves factors: what it multiplies each channel by is all that a method has to say.

    Attributes:
        moments: whether it looks at second moments of the channels.
    """

    moments: ClassVar[bool] = False

    @abstractmethod
    def takes(self, fold: Fold) -> bool:
        """Whether it works on this kind of pair."""

    @abstractmethod
    def factor(self, channel: Channel) -> Tensor:
        """``s``, what the channels are divided by before and multiplied by behind; float32 [channels], positive."""

    def works_on(self, adapter: Adapter, block: Any, config: Any) -> bool:
        return any(self.takes(fold) for fold in folds_of(adapter, block, config))

    def rewrites(self, window: Window, adapter: Adapter, path: str) -> Iterator[Rewrite]:
        folds = [f for f in folds_of(adapter, window.block.module, window.calibration.config) if self.takes(f)]
        for channel in channels_of(window, folds, path, self.moments):
            yield scaling(window.block, channel, self.factor(channel))


def scaling(state: BlockState, channel: Channel, factor: Tensor) -> Rewrite:
    """Divide the channels of a pair by ``factor`` before, and multiply by it behind."""
    matrices, fold, rows = Matrices(state), channel.fold, channel.rows
    first = fold.norm if isinstance(fold, NormFold) else fold.first
    bias = matrices.bias(first)
    makes = (f"{first}.weight",) if isinstance(fold, NormFold) else matrices.parameters(first)
    reads = [parameter for name in behind_of(fold) for parameter in matrices.parameters(name)]
    dtype = _live_dtype(state, first) if isinstance(fold, NormFold) else torch.float32

    def function(weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found, by = {}, parameters["factor"]
        if isinstance(fold, NormFold):
            found[f"{first}.weight"], by = _divided_norm(weights[f"{first}.weight"], by, fold.offset, dtype)
            over = by
        else:
            assert rows is not None
            by = one_a_row(by, rows)
            matrix = matrices.get(first, weights)
            over = matrix.new_ones(len(matrix)).index_put((rows,), by)
            found |= matrices.put(first, matrix / over[:, None])
        if bias is not None:
            found[bias] = weights[bias] / over
        for name in behind_of(fold):
            found |= matrices.put(name, matrices.get(name, weights) * by)
        return found

    names = (*makes, *([bias] if bias else []), *reads)
    return Rewrite(weights=names, parameters={"factor": factor}, function=function)


def _divided_norm(old: Tensor, by: Tensor, offset: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A norm's new weights, rounded to its dtype, and by how much its output is really divided."""
    old = old + offset
    new = (old / by - offset).to(dtype).float()
    really = torch.where((new + offset != 0) & (old != 0), old / (new + offset), torch.ones_like(old))
    return torch.where(really == 1, old - offset, new), really


def _live_dtype(state: BlockState, norm: str) -> torch.dtype:
    """In which a norm's weights are used, and so rounded."""
    found: Tensor = state.module.get_submodule(norm).weight  # type: ignore[assignment]
    return found.dtype


def one_a_row(factor: Tensor, rows: Tensor) -> Tensor:
    """The largest factor among the channels that one row feeds (grouped-query attention), for each channel."""
    most = factor.new_zeros(int(rows.max()) + 1).scatter_reduce(0, rows, factor, "amax")
    return most[rows]


def safe_factor(factor: Tensor, alive: Tensor) -> Tensor:
    """``factor`` where channels are alive and it is a usable number, else 1 (dead channels move nothing)."""
    usable = alive & torch.isfinite(factor) & (factor > 0)
    return torch.where(usable, factor, torch.ones_like(factor)).clamp(1e-5, 1e5)


def rounded_to_pow2(factor: Tensor) -> Tensor:
    """The nearest power of two in the logarithm: such factors move through float weights without any rounding."""
    return torch.exp2(factor.log2().round())
