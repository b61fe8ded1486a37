"""Whether examples fit a model: its positions, its embeddings, its padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from nybble.core.errors import DataError, UsageError
from nybble.nn.embedding import input_embedding
from nybble.training.measures import longest


def check_length(model: Any, name: str, seq_len: int, option: str = "seq_len") -> None:
    """Refuse more tokens than the model ``name`` has positions for; ``option`` is what asked for them.

    Raises:
        UsageError: names the most that fits.
    """
    most = longest(model.config)
    if most is not None:
        most -= _unused(model)
    if most is not None and seq_len > most:
        raise UsageError(f"{option} is {seq_len}, and {name} has positions for {most} tokens; ask for fewer.")


def check_tokens(model: Any, rows: Iterable[Sequence[int]], source: str) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        DataError: names the first such token.
    """
    table: Any = input_embedding(model)
    largest = max(map(max, rows))
    if table is not None and largest >= table.num_embeddings:
        raise DataError(
            f"data {source!r} has token {largest}, and the model's embeddings have {table.num_embeddings} rows; is it "
            "its tokenizer?"
        )


def padding_of(model: Any) -> int:
    """The token that the model takes for padding: some heads look for the last token in front of it.

    Raises:
        DataError: its config names none.
    """
    found = getattr(model.config.get_text_config(), "pad_token_id", None)
    if not isinstance(found, int):
        raise DataError(
            "the model's config names no padding token, so examples of different lengths can't be put into one batch. "
            "Set pad_token_id in its config.json."
        )
    return found


def _unused(model: nn.Module) -> int:
    """Positions in front of the first token's, in RoBERTa and what is made like it."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(getattr(module, "padding_idx")) + 1  # noqa: B009 - mypy knows no such attribute
    return 0
