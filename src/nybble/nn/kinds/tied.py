"""Output heads and embeddings that read another's quantized table; quantizing that one makes them, no scheme does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nybble.core.errors import ModelError, SchemeError
from nybble.nn.embedding import QuantEmbedding, RowScale, TiedEmbedding, TiedHead, input_embedding
from nybble.nn.kinds import Get, Kind, Quantized, Stored, Target, kind_of, matrix_at, module_at
from nybble.nn.layouts import Layouts
from nybble.nn.packed import Packed
from nybble.nn.swap import set_module
from nybble.nn.twin import FakeWeight
from nybble.qtensor import QTensor
from nybble.scheme import Matches


class Tied(Kind):
    """Nothing in float is of this kind."""

    entry = "tied"
    classes = ()
    sides = ()
    refusal = "this head is tied to the embeddings."
    stand_ins = (TiedHead, TiedEmbedding)
    reads_another = True

    def claims(self, module: nn.Module) -> bool:  # noqa: D102
        return False

    def matrix(self, module: nn.Module, leaf: str, get: Get) -> Tensor:  # noqa: D102
        return get("weight")

    def values(self, module: nn.Module, leaf: str, matrix: Tensor) -> dict[str, Tensor]:  # noqa: D102
        return {"weight": matrix}

    def put(self, root: nn.Module, target: Target, made: Quantized) -> None:  # noqa: D102
        tie(root, target.name)

    def describe(self, module: nn.Module, layouts: Layouts) -> dict[str, Any]:  # noqa: D102
        assert isinstance(module, TiedHead | TiedEmbedding)
        return {"class": self.entry} | ({"table": module.table} if module.table else {})

    def restore(self, root: nn.Module, name: str, entry: dict[str, Any], layouts: Layouts) -> None:  # noqa: D102
        module_at(root, name, name)
        tie(root, name, entry.get("table", ""))

    def stored(self, name: str, entry: dict[str, Any], weights: Sequence[QTensor], into: Stored) -> None:
        """The embedding stores the table."""


def tie(root: nn.Module, name: str, table: str = "") -> None:
    """Replace an output head or an embedding, tied before or not, by one that reads another's quantized table.

    Args:
        root: the model.
        name: of what is replaced; an embedding keeps the scale that it had.
        table: name of the embedding whose table it reads; empty for what the model calls its input embedding.

    Raises:
        ModelError: that isn't quantized, or is of another shape.
    """
    reads_ids = isinstance(root.get_submodule(name), nn.Embedding | TiedEmbedding)
    (_tie_table if reads_ids else _tie_head)(root, name, table)
    untie(root)


def _tie_head(root: nn.Module, name: str, table: str) -> None:
    embedding, head = quantized_table(root, name, table), root.get_submodule(name)
    if _shape(root, name) != (embedding.num_embeddings, embedding.embedding_dim):
        raise ModelError(f"{name} is no head over the {embedding.num_embeddings} tokens of {_called(table)}.")
    # Its own: with nothing tied, transformers would save one of two biases that share memory and load two.
    bias = head.bias.detach().clone() if isinstance(head.bias, Tensor) else None
    set_module(root, name, TiedHead(embedding, bias, table))


def _tie_table(root: nn.Module, name: str, table: str) -> None:
    old: Any = root.get_submodule(name)
    embedding = quantized_table(root, name, table)
    if (old.num_embeddings, old.embedding_dim) != (embedding.num_embeddings, embedding.embedding_dim):
        raise ModelError(f"{name} is no table of the {embedding.num_embeddings} tokens of {_called(table)}.")
    set_module(root, name, TiedEmbedding(embedding, row_scale(old), table))


def check_shared(targets: Sequence[Target], found: Matches) -> None:
    """Raise SchemeError where only some of the embeddings that share a table are to be quantized.

    Args:
        targets: planned.
        found: what a scheme did with all modules.
    """
    taken = {name for target in targets for name in (target.name, *target.shares)}
    for name in found.rules:
        if name not in taken:
            raise SchemeError(f"{name}: it shares its table with the input embedding, which no rule takes. Name that.")
    for target in targets:
        for name in target.shares:
            if name in found.ignored:
                raise SchemeError(
                    f"{target.name}: {name}, which shares its table, is ignored. Ignore both, or neither."
                )


def untie_head(model: Any) -> None:
    """Give an output head that shares the input embedding's table one of its own, with the same values."""
    head, embedding = model.get_output_embeddings(), input_embedding(model)
    if embedding is not None and isinstance(head, nn.Linear) and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)  # by what it says now


def row_scale(module: nn.Module) -> RowScale | None:
    """What an embedding multiplies its rows with; None of one that doesn't, or does something else with them.

    The families of transformers each have a class for it, of two sorts: one multiplies with a number, the other with
    a buffer in the dtype of the rows.
    """
    if isinstance(module, QuantEmbedding | TiedEmbedding):
        return module.scale
    cls = type(module)
    known = cls.__name__.endswith("ScaledWordEmbedding") and cls.__module__.startswith("transformers.models.")
    if not known or cls.__base__ is not nn.Embedding or module._parameters.keys() != {"weight"}:
        return None
    scale, plain = getattr(module, "embed_scale", None), getattr(module, "scalar_embed_scale", None)
    if isinstance(scale, Tensor):
        return None if plain is None else RowScale(float(plain), rounded=True)
    return None if scale is None else RowScale(float(scale), rounded=False)


def input_table(root: nn.Module) -> str:
    """Name of what a model calls its input embedding; empty where it names none."""
    table = input_embedding(root)
    return "" if table is None else next((name for name, module in root.named_modules() if module is table), "")


def _called(table: str) -> str:
    return table or "the input embedding"


def quantized_table(root: nn.Module, name: str, table: str) -> QuantEmbedding:
    """The embedding whose table ``name`` is to read; arguments and errors as :func:`tie`."""
    embedding = module_at(root, table, table) if table else input_embedding(root)
    if not isinstance(embedding, QuantEmbedding):
        raise ModelError(f"{name} is tied to {_called(table)}, which is not quantized.")
    return embedding


def untie(root: nn.Module) -> None:
    """Leave transformers no table to tie that is packed or trains; the config stays: some forwards scale by it."""
    for module in root.modules():
        keys = getattr(module, "_tied_weights_keys", None) or {}
        if any(_is_ours(module, name) for pair in keys.items() for name in pair):
            module._tied_weights_keys = {}  # type: ignore[assignment]
    model: Any = root
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _is_ours(root: nn.Module, name: str) -> bool:
    """Whether what was a parameter called ``name`` is packed or trains, or is read from such a table."""
    owner, _, leaf = name.rpartition(".")
    try:
        return isinstance(getattr(root.get_submodule(owner), leaf), Packed | FakeWeight)
    except AttributeError:  # a pattern
        return False


def tie_to_quantized(root: nn.Module, ties: Mapping[str, str]) -> list[str]:
    """Let heads and embeddings in float that a model ties to a table read it, where that is quantized now.

    Args:
        root: the model.
        ties: its ``all_tied_weights_keys`` before anything in it was replaced.

    Returns:
        their names.
    """
    found: list[str] = []
    weights = [pair for pair in ties.items() if all(name.endswith(".weight") for name in pair)]
    pairs = [(name.removesuffix(".weight"), table.removesuffix(".weight")) for name, table in weights]
    for name, table in (*pairs, *((table, name) for name, table in pairs)):
        if isinstance(root.get_submodule(table), QuantEmbedding) and kind_of(root.get_submodule(name)) is not None:
            tie(root, name, "" if table == input_table(root) else table)
            found.append(name)
    return found


def _shape(root: nn.Module, name: str) -> tuple[int, ...]:
    """[tokens, width] of a head; nothing if there is none."""
    head = root.get_submodule(name)
    if isinstance(head, TiedHead):
        return head.out_features, head.in_features
    return () if kind_of(head) is None else tuple(matrix_at(root, name).shape)


PART = Tied()
