"""Output heads and embeddings that read another's quantized table; quantizing that one makes them, no scheme does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from nybble.core.errors import ModelError
from nybble.nn.embedding import QuantEmbedding, RowScale, TiedEmbedding, TiedHead, input_embedding
from nybble.nn.kinds import Get, Kind, Quantized, Stored, Target, kind_of, matrix_at, module_at
from nybble.nn.layouts import Layouts
from nybble.nn.swap import set_module
from nybble.qtensor import QTensor


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
        tie_head(root, target.name)

    def describe(self, module: nn.Module, layouts: Layouts) -> dict[str, Any]:  # noqa: D102
        return {"class": self.entry}

    def restore(self, root: nn.Module, name: str, entry: dict[str, Any], layouts: Layouts) -> None:  # noqa: D102
        reads_ids = isinstance(module_at(root, name, name), nn.Embedding | TiedEmbedding)
        (tie_table if reads_ids else tie_head)(root, name)

    def stored(self, name: str, entry: dict[str, Any], weights: Sequence[QTensor], into: Stored) -> None:
        """The embedding stores the table."""


def tie_head(root: nn.Module, name: str) -> None:
    """Replace an output head, tied before or not, by one that reads the (quantized) input embedding's table.

    Raises:
        ModelError: the input embedding isn't quantized, or is of another shape.
    """
    embedding, head = _quantized_table(root, name), root.get_submodule(name)
    if _shape(root, name) != (embedding.num_embeddings, embedding.embedding_dim):
        raise ModelError(f"{name} is no head over the {embedding.num_embeddings} tokens of the input embedding.")
    # Its own: with nothing tied, transformers would save one of two biases that share memory and load two.
    bias = head.bias.detach().clone() if isinstance(head.bias, Tensor) else None
    set_module(root, name, TiedHead(embedding, bias))
    _untie(root)


def tie_table(root: nn.Module, name: str) -> None:
    """Replace an embedding by one that reads the (quantized) input embedding's table, with the scale that it had.

    Raises:
        ModelError: the input embedding isn't quantized, or is of another shape.
    """
    old: Any = root.get_submodule(name)
    embedding = _quantized_table(root, name)
    if (old.num_embeddings, old.embedding_dim) != (embedding.num_embeddings, embedding.embedding_dim):
        raise ModelError(f"{name} is no table of the {embedding.num_embeddings} tokens of the input embedding.")
    set_module(root, name, TiedEmbedding(embedding, row_scale(old)))
    _untie(root)


def untie_head(model: Any) -> None:
    """Give an output head that shares the input embedding's table one of its own, with the same values."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, nn.Linear) and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        _untie(model)


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


def _quantized_table(root: nn.Module, name: str) -> QuantEmbedding:
    model: Any = root
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, QuantEmbedding):
        raise ModelError(f"{name} is tied to the input embedding, which is not quantized.")
    return embedding


def _untie(root: nn.Module) -> None:
    model: Any = root
    model.config.get_text_config().tie_word_embeddings = False  # nothing is left for transformers to tie
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)  # by what it says now


def tie_to_quantized(root: nn.Module) -> str:
    """Let the head of a model whose config ties it read the input embedding's table, where that is quantized.

    Returns:
        the head's name; empty if there is nothing to tie.
    """
    model: Any = root
    head = model.get_output_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if not tied or not isinstance(head, nn.Module) or not isinstance(model.get_input_embeddings(), QuantEmbedding):
        return ""
    name: str = next(name for name, module in model.named_modules() if module is head)
    tie_head(model, name)
    return name


def _shape(root: nn.Module, name: str) -> tuple[int, ...]:
    """[tokens, width] of a head; nothing if there is none."""
    head = root.get_submodule(name)
    if isinstance(head, TiedHead):
        return head.out_features, head.in_features
    return () if kind_of(head) is None else tuple(matrix_at(root, name).shape)


PART = Tied()
