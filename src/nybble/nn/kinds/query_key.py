"""The one layer for queries and keys of an attention that training puts there (:mod:`nybble.nn.query_key`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from nybble.core.errors import FileError
from nybble.nn.attention import use_quantized_attention
from nybble.nn.kinds import Get, LayerKind, Quantized, Target, module_at
from nybble.nn.layouts import Layouts
from nybble.nn.query_key import PART as NAME
from nybble.nn.query_key import QuantQueryKey, QueryKey, use_query_key
from nybble.qtensor import QTensor


class QueryKeyLayer(LayerKind):
    """``x W^T + b`` for each row x."""

    entry = "query-key"
    classes = ("Linear",)
    stand_ins = (QuantQueryKey,)
    by_rows = True
    ours_alone = True

    def claims(self, module: nn.Module) -> bool:  # noqa: D102
        return isinstance(module, QueryKey)

    def matrix(self, module: nn.Module, leaf: str, get: Get) -> Tensor:  # noqa: D102
        return get("weight")

    def values(self, module: nn.Module, leaf: str, matrix: Tensor) -> dict[str, Tensor]:  # noqa: D102
        return {"weight": matrix}

    def stand_in(  # noqa: D102
        self, old: nn.Module, weight: QTensor | Tensor, bias: Tensor | None, made: Quantized
    ) -> QuantQueryKey:
        assert isinstance(old, QueryKey)
        return QuantQueryKey(weight, bias, made.inputs, made.outputs, query=old.query, key=old.key)

    def prepare(self, model: nn.Module) -> None:  # noqa: D102
        use_quantized_attention(model)

    def prepare_twins(self, model: nn.Module, targets: Sequence[Target]) -> None:  # noqa: D102
        use_quantized_attention(model)

    def more(self, module: nn.Module) -> dict[str, Any]:  # noqa: D102
        assert isinstance(module, QuantQueryKey)
        return {"query": module.query, "key": module.key}

    def holder(self, name: str) -> str:  # noqa: D102
        return name.rpartition(".")[0]

    def restore(self, root: nn.Module, name: str, entry: dict[str, Any], layouts: Layouts) -> None:  # noqa: D102
        attention, leaf = module_at(root, self.holder(name), name), name.rpartition(".")[2]
        if not isinstance(attention._modules.get(leaf), QueryKey):
            if leaf != NAME:
                raise FileError(f"{name} is described as an attention's {NAME}, which has another name.")
            use_query_key(attention, str(entry["query"]), str(entry["key"]))
        super().restore(root, name, entry, layouts)


PART = QueryKeyLayer()
