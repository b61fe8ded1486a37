"""K-sort: channels of every head in the order of their weights' norms, so that neighbours in a cache are of a size.

Trukhanov and Soloveychik 2024, arXiv:2403.20137: keys are cached in blocks that share an exponent, outliers sit in
fixed channels, and a product of queries and keys doesn't change when the channels of both are permuted alike. Head by
head, by the norms of the rows of W_k, and by W_v's for values, whose order the columns of W_o take (the second is ours:
the paper works out keys).

Behind a rotary embedding the rows of W_k can't move: place i has frequency i, and transformers' tables are one for all
heads. Nor can they where queries or keys are normalised with weights of their own. There the cache keeps the order
(``sort=keys`` in its line, :mod:`nybble.nn.kv_basis`), and this sorts values alone.

It helps where a moderate number of channels is large and of a size. Where sizes are spread far, large channels share
the coarsest steps and lose more than the small ones gain: compare with the unsorted cache (benchmarks/kv_formats.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from nybble.calibration.block import BlockState
from nybble.calibration.matrices import Matrices
from nybble.calibration.mixing import Places, mixed_rows, mixing
from nybble.calibration.window import Window
from nybble.core.errors import ModelError
from nybble.models.adapter import Adapter, LinearFold, QueryKeyFold, query_key_rows
from nybble.nn.kv_basis import descending
from nybble.transforms import Rewrite, Transform


@dataclass(frozen=True, kw_only=True)
class KSort(Transform):
    """Options of the method.

    Attributes:
        keys: ``auto`` sorts queries and keys where nothing lies between them, ``fold`` refuses a model where something
            does, ``leave`` leaves them as they are.
        values: whether values are sorted, with what reads them.
    """

    keys: Literal["auto", "fold", "leave"] = "auto"
    values: bool = True

    reads_inputs: ClassVar[bool] = False

    def works_on(self, adapter: Adapter, block: Any, config: Any) -> bool:  # noqa: D102
        return bool(self._values(adapter, block, config) or self._keys(adapter, block, config))

    def check(self, name: str, adapter: Adapter, model: Any) -> None:  # noqa: D102
        if self.keys == "fold" and not any(
            self._keys(adapter, block, model.config) for block in adapter.blocks_of(model)
        ):
            raise ModelError(
                f"transform {name!r}: keys can't be sorted in the weights of {type(model).__name__}. A rotary "
                "embedding turns each place by a frequency of its own, norms of queries and keys have weights for "
                f"each place, or the adapter {adapter.name} doesn't list the two layers. Write 'sort=keys' in the line "
                "of the KV cache, which then keeps the order, and keys: auto here."
            )
        super().check(name, adapter, model)

    def rewrites(self, window: Window, adapter: Adapter, path: str) -> Iterator[Rewrite]:  # noqa: D102
        state, config = window.block, window.calibration.config
        matrices = Matrices(state)
        for fold in self._values(adapter, state.module, config):
            matrix = matrices.get(fold.first)
            places = Places.of(fold, matrices.get(fold.second).shape[-1], config, matrix.device)
            yield mixing(state, fold, places, {"order": _order(matrix, places.rows)})
        for pair in self._keys(adapter, state.module, config):
            yield _sorting(state, pair, config)

    def _values(self, adapter: Adapter, block: Any, config: Any) -> list[LinearFold]:
        return [fold for fold in adapter.linear_folds_of(block, config) if fold.heads and self.values]

    def _keys(self, adapter: Adapter, block: Any, config: Any) -> list[QueryKeyFold]:
        folds = adapter.query_key_folds_of(block, config)
        return [fold for fold in folds if not fold.rotary and self.keys != "leave"]


def _order(matrix: Tensor, rows: Tensor) -> Tensor:
    """int64 [blocks, width]: by the norms of the rows [blocks, width] of a matrix."""
    norms = matrix.double().norm(dim=1)[rows]
    return descending(norms.cpu()).to(rows.device)


def _sorting(state: BlockState, fold: QueryKeyFold, config: Any) -> Rewrite:
    """Queries and keys in the order of the keys: all query heads of a group in that of their one key head."""
    matrices = Matrices(state)
    keys = matrices.get(fold.key)
    found = query_key_rows(fold, config, len(matrices.get(fold.query)))
    (q_rows, q_units), (k_rows, k_units) = ((rows.to(keys.device), units.to(keys.device)) for rows, units in found)
    width = len(q_rows) // int(config.num_attention_heads)
    read = Places(rows=k_rows.view(-1, width), reads=k_units.view(-1, width)[:, 0] // width)
    asked = replace(read, rows=q_rows.view(-1, width), reads=q_units.view(-1, width)[:, 0] // width)
    names = [parameter for name in (fold.query, fold.key) for parameter in matrices.parameters(name)]
    biases = [bias for name in (fold.query, fold.key) if (bias := matrices.bias(name)) is not None]

    def function(weights: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        now = dict(weights)
        for name, places in ((fold.query, asked), (fold.key, read)):
            order = {"order": given["order"][places.reads]}
            now |= matrices.put(name, mixed_rows(matrices.get(name, now), places, order))
            bias = matrices.bias(name)
            if bias is not None:
                now[bias] = mixed_rows(now[bias][:, None], places, order)[:, 0]
        return now

    parameters = {"order": _order(keys, read.rows)}
    return Rewrite(weights=tuple(dict.fromkeys((*names, *biases))), parameters=parameters, function=function)


PART = KSort
