"""Embeddings: a table of rows that are looked up; an output head, and other embeddings, may read the same table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from nybble.core.errors import ModelError, SchemeError
from nybble.learned import Learned
from nybble.nn.embedding import QuantEmbedding
from nybble.nn.fake_embedding import FakeEmbedding, FakeTiedEmbedding, FakeTiedHead
from nybble.nn.kinds import Get, Kind, Quantized, Site, Stored, Target, kind_of, module_at
from nybble.nn.kinds.tied import input_table, row_scale, tie, untie
from nybble.nn.layouts import Layouts
from nybble.nn.plain import computes_as
from nybble.nn.swap import set_module
from nybble.nn.twin import Twin
from nybble.qtensor import QTensor


class Embedding(Kind):
    """``table[ids]``, scaled where the model does; the matrix is the table [tokens, width]."""

    entry = "embedding"
    classes = ("Embedding",)
    sides = ("weights",)
    refusal = "this is an embedding: its rule has weights only. Give it a rule of its own."
    stand_ins = (QuantEmbedding,)

    def claims(self, module: nn.Module) -> bool:  # noqa: D102
        return computes_as(module, (nn.Embedding,)) or row_scale(module) is not None

    def resembles(self, module: nn.Module) -> bool:  # noqa: D102
        return isinstance(module, nn.Embedding)

    def tied(self, target: Target, root: nn.Module, others: Sequence[str]) -> Target | None:
        """With the one head that reads its table, and the other embeddings (an encoder's and a decoder's).

        What the model calls its input embedding is the target then, and the others follow it (None).
        """
        names = [name.removesuffix(".weight") for name in others]
        kinds = {name: kind_of(root.get_submodule(name)) for name in names}
        heads = [name for name, kind in kinds.items() if kind is not None and kind.by_rows]
        tables = [name for name, kind in kinds.items() if kind is self]
        if len(heads) + len(tables) < len(names) or len(heads) > 1:
            raise SchemeError(f"it shares its table with {', '.join(names)}; that is not supported. Ignore it.")
        if tables and (first := input_table(root)) != target.name:
            if first in tables:
                return None
            raise SchemeError(
                f"it shares its table with {', '.join(names)}, and none of them is what the model calls its input "
                "embedding. Ignore them."
            )
        return replace(target, head=heads[0] if heads else "", shares=tuple(tables))

    def matrix(self, module: nn.Module, leaf: str, get: Get) -> Tensor:  # noqa: D102
        return get("weight")

    def values(self, module: nn.Module, leaf: str, matrix: Tensor) -> dict[str, Tensor]:  # noqa: D102
        return {"weight": matrix}

    def put(self, root: nn.Module, target: Target, made: Quantized) -> None:  # noqa: D102
        (table,) = made.weights
        _put(root, target.name, table)
        called = "" if target.name == input_table(root) else target.name
        for name in (*target.shares, *([target.head] if target.head else [])):
            tie(root, name, called)

    def sites(self, target: Target, module: nn.Module) -> Iterator[Site]:  # noqa: D102
        if target.rule.weights is not None:
            yield Site(name="weights", quantizer=target.rule.weights, example=module.get_parameter("weight").detach())

    def put_twin(self, root: nn.Module, target: Target, learned: Mapping[str, Learned]) -> list[Twin]:
        """One for the table, and one for each that reads it too."""
        called = "" if target.name == input_table(root) else target.name
        twin = FakeEmbedding(root.get_submodule(target.name), learned["weights"])
        found: dict[str, Twin] = {target.name: twin}
        found |= {name: FakeTiedEmbedding(twin, root.get_submodule(name), called) for name in target.shares}
        if target.head:
            found[target.head] = FakeTiedHead(twin, root.get_submodule(target.head), called)
        for name, each in found.items():
            set_module(root, name, each)
        untie(root)
        return [*found.values()]

    def describe(self, module: nn.Module, layouts: Layouts) -> dict[str, Any]:  # noqa: D102
        assert isinstance(module, QuantEmbedding)
        number = layouts.number(module.weight.qtensor())
        return {"class": self.entry, "weight": number, "dtype": str(module.dtype).removeprefix("torch.")}

    def restore(self, root: nn.Module, name: str, entry: dict[str, Any], layouts: Layouts) -> None:  # noqa: D102
        module_at(root, name, name)
        _put(root, name, layouts.empty(int(entry["weight"])))

    def stored(self, name: str, entry: dict[str, Any], weights: Sequence[QTensor], into: Stored) -> None:  # noqa: D102
        into.weight(f"{name}.weight", weights[entry["weight"]])


def _put(root: nn.Module, name: str, table: QTensor) -> None:
    old: Any = root.get_submodule(name)
    if not PART.claims(old) or tuple(old.weight.shape) != tuple(table.shape):
        raise ModelError(f"{name} is a {type(old).__name__}, not a plain embedding of shape {list(table.shape)}.")
    set_module(root, name, QuantEmbedding(table, old.weight.dtype, old.padding_idx, row_scale(old)))


PART = Embedding()
