"""Channels between the weights of a block that may be rescaled together: found once, for transforms and for learning.

A factor goes from one weight to the other: ``norm / s`` before and ``weight * s`` behind (a norm fold), rows of one
linear layer by ``1 / s`` and columns of the next by ``s`` (a linear fold), rows of the queries by ``1 / s`` and of the
keys by ``s`` (a query-key fold). A shift goes with it where there are biases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.calibration.block import BlockState
from nybble.calibration.matrices import Matrices, Rewrite
from nybble.calibration.mixing import Places, mixed_columns, mixing
from nybble.calibration.watch import see_channels
from nybble.calibration.window import Window
from nybble.learned.transforms import Extent, Function, Heads, Place
from nybble.models.adapter import Adapter, LinearFold, NormFold, QueryKeyFold, feeding_rows, query_key_rows
from nybble.nn.kinds import Target
from nybble.quantizer import Quantizer

Fold = NormFold | LinearFold


def folds_of(adapter: Adapter, block: Any, config: Any) -> list[Fold]:
    """All pairs of a block."""
    return [*adapter.norm_folds_of(block, config), *adapter.linear_folds_of(block, config)]


@dataclass(frozen=True, kw_only=True)
class Channel:
    """The channels between two weights, as a transform sees them.

    Attributes:
        fold: the pair, from the adapter.
        largest: largest magnitude that calibration saw in each channel, float32 [channels].
        before: rows of the weight that produce each channel, float32 [channels, columns]; None behind a norm.
        behind: weights that read the channels, float32 [rows, channels] each (of fused experts [experts, rows,
            channels]).
        lowest, highest: of all values that calibration saw, float32 [channels].
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
    lowest: Tensor | None = None
    highest: Tensor | None = None

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
    sizes = see_channels(window.block.module, list(readers), window.own(path), moments)
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
            lowest=sizes[name].lowest, highest=sizes[name].highest,
        )  # fmt: skip


def behind_of(fold: Fold) -> tuple[str, ...]:
    """Names of the weights that read the channels."""
    return fold.readers if isinstance(fold, NormFold) else (fold.second,)


def _reader(state: BlockState, fold: Fold) -> str:
    """A module whose input is the channels (fused experts are parameters, with a router beside them)."""
    modules = dict(state.module.named_modules())
    return next(name for name in fold.readers if name in modules) if isinstance(fold, NormFold) else fold.second


def scaling(state: BlockState, channel: Channel, factor: Tensor) -> Rewrite:
    """Divide the channels of a pair by ``factor`` before, and multiply by it behind."""
    weights, function = fold_function(state, channel.fold, channel.rows)
    return Rewrite(weights=weights, parameters={"factor": factor}, function=function)


def fold_function(
    state: BlockState, fold: Fold, rows: Tensor | None, shifts: bool = False
) -> tuple[tuple[str, ...], Function]:
    """How the channels of a pair are rescaled: the names of what is read, and the function.

    Args:
        state: the block. The function looks at its float modules: call it while these stand there.
        fold: the pair.
        rows: which row of the first layer makes each channel; None of a norm.
        shifts: whether the channels may be shifted too; all that makes and reads them has a bias then.

    Returns:
        names, and a function of the parameters ``factor``, float32 [channels], and where the channels are shifted
        before they are divided ``shift``, the same.
    """
    matrices = Matrices(state)
    first = fold.norm if isinstance(fold, NormFold) else fold.first
    makes = (f"{first}.weight",) if isinstance(fold, NormFold) else matrices.parameters(first)
    biases = [bias for name in (first, *(behind_of(fold) if shifts else ())) if (bias := matrices.bias(name))]
    reads = [parameter for name in behind_of(fold) for parameter in matrices.parameters(name)]
    dtype = _live_dtype(state, first) if isinstance(fold, NormFold) else torch.float32

    def function(weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found, by, shift = {}, parameters["factor"], parameters.get("shift")
        if isinstance(fold, NormFold):
            found[f"{first}.weight"], by = _divided_norm(weights[f"{first}.weight"], by, fold.offset, dtype)
            over, off = by, shift
        else:
            assert rows is not None
            matrix = matrices.get(first, weights)
            by = one_a_row(by, rows, len(matrix))
            over = matrix.new_ones(len(matrix)).index_put((rows,), by)
            off = None if shift is None else matrix.new_zeros(len(matrix)).index_put((rows,), shift)
            found |= matrices.put(first, matrix / over[:, None])
        bias = matrices.bias(first)
        if bias is not None:
            old = weights[bias]
            found[bias] = (old if off is None else old - off) / over
            if off is not None and isinstance(fold, NormFold):
                found[bias] = found[bias].to(dtype).float()
                shift = old - over * found[bias]  # what a norm in 16 bits really lost
        for name in behind_of(fold):
            matrix = matrices.get(name, {**weights, **found})
            if shift is not None:
                found[f"{name}.bias"] = {**weights, **found}[f"{name}.bias"] + (matrix * shift).sum(-1)
            found |= matrices.put(name, matrix * by)
        return found

    return tuple(dict.fromkeys((*makes, *biases, *reads))), function


def _query_key_function(state: BlockState, fold: QueryKeyFold, config: Any) -> tuple[Tensor, tuple[str, ...], Function]:
    """Of queries and keys: the free factor of each channel of a key, names, and the function."""
    matrices = Matrices(state)
    device = matrices.get(fold.key).device
    (q_rows, q_units), (k_rows, k_units) = (
        (rows.to(device), units.to(device))
        for rows, units in query_key_rows(fold, config, len(matrices.get(fold.query)))
    )
    sides = ((fold.query, q_rows, q_units, -1.0), (fold.key, k_rows, k_units, 1.0))
    names = [parameter for name in (fold.query, fold.key) for parameter in matrices.parameters(name)]
    biases = [bias for name in (fold.query, fold.key) if (bias := matrices.bias(name)) is not None]
    first = torch.stack([(k_units == unit).nonzero()[0, 0] for unit in range(int(k_units.max()) + 1)])

    def function(weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        by_unit = parameters["factor"][first]
        for name, rows, units, sign in sides:
            matrix = matrices.get(name, {**weights, **found})
            factor = by_unit[units] if sign > 0 else 1 / by_unit[units]
            times = matrix.new_ones(len(matrix)).index_put((rows,), factor)
            bias = matrices.bias(name)
            if bias is not None:
                found[bias] = {**weights, **found}[bias] * times
            found |= matrices.put(name, matrix * times[:, None])
        return found

    return k_units, tuple(dict.fromkeys((*names, *biases))), function


def places_of(state: BlockState, adapter: Adapter, config: Any) -> list[tuple[Place, Fold | None]]:
    """All places of a block where channels may be rescaled, each with its fold (None: queries and keys).

    In order: norms, attention's values, the MLP's pairs, queries and keys. What the scheme rounds is said by the
    block's targets; the factors of a place are applied to float weights.
    """
    by_name = {target.name: target for target in state.targets}
    found: list[tuple[Place, Fold | None]] = []
    with state.on("float") as block:
        linear = adapter.linear_folds_of(block, config)
        folds: list[Fold] = [*adapter.norm_folds_of(block, config), *sorted(linear, key=lambda fold: not fold.heads)]
        for fold in folds:
            found.append((_place(state, fold, config, by_name), fold))
        for pair in adapter.query_key_folds_of(block, config):
            units, weights, function = _query_key_function(state, pair, config)
            asked = [by_name.get(name) for name in (pair.query, pair.key)]
            rounded = any(t is not None and t.rule.outputs is not None for t in asked)
            place = Place(
                name=f"{pair.query} <-> {pair.key}", kind="product", makers=(pair.query,), readers=(pair.key,),
                weights=weights, function=function, units=units, rounded=rounded or _multiplied(pair.query, by_name),
            )  # fmt: skip
            found.append((place, None))
    return found


def _place(state: BlockState, fold: Fold, config: Any, by_name: Mapping[str, Target]) -> Place:
    matrices, behind = Matrices(state), behind_of(fold)
    rows, device = None, matrices.get(behind[0]).device
    units = torch.arange(matrices.get(behind[0]).shape[-1], device=device)
    if isinstance(fold, LinearFold):
        rows = feeding_rows(fold, config, len(units)).to(device)
        units = torch.unique(rows, return_inverse=True)[1]
    first = fold.norm if isinstance(fold, NormFold) else fold.first
    passes = isinstance(fold, NormFold) or fold.heads  # attention's rows sum to one; what lies in an MLP is not linear
    shifts = passes and all(matrices.bias(name) is not None for name in (first, *behind))
    weights, function = fold_function(state, fold, rows, shifts)
    inputs = [by_name[name].rule.inputs for name in behind if name in by_name]
    made = by_name[first].rule.outputs if first in by_name else None
    heads = _heads(state, fold, config, len(units)) if isinstance(fold, LinearFold) and fold.heads else None
    return Place(
        name=f"{first} -> {behind[0]}",
        kind="norm" if isinstance(fold, NormFold) else "attention" if fold.heads else "linear",
        makers=(first,), readers=behind, weights=weights, function=function, units=units,
        shifts=shifts,
        rounded=made is not None
        or any(x is not None for x in inputs)
        or (heads is not None and _multiplied(first, by_name)),
        static=any(x is not None and x.static for x in inputs),
        heads=heads,
    )  # fmt: skip


def _heads(state: BlockState, fold: LinearFold, config: Any, channels: int) -> Heads:
    """How the values of attention are rotated inside each head."""
    places = Places.of(fold, channels, config, Matrices(state).get(fold.second).device)
    rewrite = mixing(state, fold, places, {})

    def turned(x: Tensor, rotation: Tensor) -> Tensor:
        return mixed_columns(x.reshape(-1, channels), places, {"rotation": rotation}).reshape(x.shape)

    count, width = places.rows.shape
    return Heads(count=count, width=width, function=rewrite.function, turned=turned)


def _multiplied(layer: str, by_name: Mapping[str, Target]) -> bool:
    """Whether a layer is part of an attention whose products take rounded operands."""
    return any(t.rule.matmuls is not None and layer.startswith(f"{t.name}.") for t in by_name.values())


def extents_of(window: Window, folds: Sequence[Fold | None], path: str) -> list[Extent | None]:
    """What calibration shows of the channels of places; None of products, and of channels that were never seen."""
    known: dict[str, Extent] = {}
    with window.block.on("float"):
        for channel in channels_of(window, [fold for fold in folds if fold is not None], path):
            assert channel.lowest is not None and channel.highest is not None
            behind = torch.stack([weight.abs().flatten(0, -2).amax(0) for weight in channel.behind]).amax(0)
            known[repr(channel.fold)] = Extent(lowest=channel.lowest, highest=channel.highest, behind=behind)
    return [None if fold is None else known.get(repr(fold)) for fold in folds]


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


def one_a_row(factor: Tensor, rows: Tensor, count: int | None = None) -> Tensor:
    """The largest factor among the channels that one row feeds (grouped-query attention), for each channel.

    ``count``: how many rows there are; None looks, for which a GPU is waited for.
    """
    size = int(rows.max()) + 1 if count is None else count
    most = factor.new_zeros(size).scatter_reduce(0, rows, factor, "amax")
    return most[rows]
