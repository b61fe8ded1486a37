"""The smaller network: rows and columns that masks keep, tokens that they let go of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import ModelError, SchemeError
from nybble.models.own.slim_vit import SlimViTConfig, SlimViTForImageClassification
from nybble.search.slimming.choose import Kept, check_kept


def full_kept(model: Any) -> Kept:
    """Everything, of a ViTForImageClassification."""
    config, layers = model.config, model.vit.layers
    number = config.num_attention_heads
    patches = model.vit.embeddings.patch_embeddings.num_patches
    return {
        "attention": [torch.ones(number, config.hidden_size // number, dtype=torch.bool) for _ in layers],
        "mlp": [torch.ones(config.intermediate_size, dtype=torch.bool) for _ in layers],
        "tokens": [torch.ones(patches, dtype=torch.bool) for _ in layers],
    }


def slim_config(config: Any, kept: Kept) -> SlimViTConfig:
    """The config of the smaller network; the full one's where a kind is whole."""
    given = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    made = SlimViTConfig(**given)
    made.head_features = [each.sum(1).tolist() for each in kept["attention"]]
    made.mlp_units = [int(each.sum()) for each in kept["mlp"]]
    whole = all(bool(each.all()) for each in kept["tokens"])
    made.patches = None if whole else [each.nonzero().flatten().tolist() for each in kept["tokens"]]
    return made


@torch.no_grad()
def sliced(model: Any, kept: Kept) -> SlimViTForImageClassification:
    """The smaller network, with the weights of a full one.

    Args:
        model: a ViTForImageClassification, its layers behind masks or not; it is left as it is.
        kept: what stays.

    Raises:
        SchemeError: masks of other shapes than the model has. ModelError: an empty layer, or tokens that come back.
    """
    for kind, every in full_kept(model).items():
        if [each.shape for each in kept[kind]] != [each.shape for each in every]:
            raise SchemeError(f"masks of {kind} have other shapes than the model: {[*kept[kind][0].shape]} ...")
    check_kept(kept)
    first = next(model.parameters())
    with torch.device("meta"):
        try:
            made: Any = SlimViTForImageClassification(slim_config(model.config, kept))
        except ValueError as error:
            raise ModelError(f"no such network: {error}") from error
    made.to_empty(device=first.device)
    made.to(first.dtype).load_state_dict(_weights(model, kept), assign=False)
    return made.eval()  # type: ignore[no-any-return]


def _weights(model: Any, kept: Kept) -> dict[str, Tensor]:
    """By the smaller network's names."""
    names = {name: name.replace(".layer.", ".") for name in model.state_dict() if ".mask." not in name}
    found = {plain: model.state_dict()[name] for name, plain in names.items()}
    for number in range(len(kept["mlp"])):
        at = f"vit.layers.{number}"
        rows, units = kept["attention"][number].flatten(), kept["mlp"][number]
        chosen: dict[str, tuple[Tensor | None, Tensor | None]] = {
            f"{at}.attention.{name}_proj": (rows, None) for name in "qkv"
        }
        chosen |= {
            f"{at}.attention.o_proj": (None, rows),
            f"{at}.mlp.fc1": (units, None),
            f"{at}.mlp.fc2": (None, units),
        }
        for name, (of_rows, of_columns) in chosen.items():
            for key in (f"{name}.weight", f"{name}.bias"):
                if key not in found:
                    continue
                value = found[key]
                value = value if of_rows is None else value[of_rows.to(value.device)]
                found[key] = value if of_columns is None or value.dim() == 1 else value[:, of_columns.to(value.device)]
    return found
