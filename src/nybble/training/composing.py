"""Query-key reparameterisation of a whole network: the one layer of :mod:`nybble.nn.query_key` in each attention."""

from __future__ import annotations

from typing import Any

from nybble.core.errors import ModelError
from nybble.models.adapter import adapter_for
from nybble.nn.attention import use_quantized_attention
from nybble.nn.query_key import use_query_key


def compose_query_keys(model: Any) -> None:
    """Put one layer where each attention of a vision transformer has two, for queries and for keys.

    The network computes what it did (softmax takes off what the keys' bias adds), by nybble's attention from here on.

    Args:
        model: of transformers, in float; changed in place.

    Raises:
        ModelError: its queries and keys are not multiplied as they come, or don't read the same tokens.
    """
    family = adapter_for(model)
    folds = family.query_key_folds if family.reads == "images" else ()
    places = [
        (model.get_submodule(f"{block}.{fold.query}".rpartition(".")[0]), fold)
        for block in family.block_names(model)
        for fold in folds
    ]
    if not places:
        raise ModelError(
            f"query_key: queries and keys of {type(model).__name__} are not known to be linear in the same tokens; "
            "it is for ViT and DeiT. Leave it out."
        )
    use_quantized_attention(model)
    for attention, fold in places:
        use_query_key(attention, *(name.rpartition(".")[2] for name in (fold.query, fold.key)))
