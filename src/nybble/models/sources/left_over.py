"""Tensors of a file that its config has no place for: harmless ones, others, and those that the model can't be without.

Transformers drops all of them. A model that misses its biases or some of its blocks still runs, and so does the float
model that it is compared with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: what models compute for themselves and older versions of them, or other programs, stored; for ``re.search``
HARMLESS = (
    r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$",
    r"(^|\.)(position_ids|token_type_ids|relative_position_index|relative_coords_table)$",
    r"(^|\.)(attn|attention|self_attention|self_attn|crossattention)\.(bias|masked_bias)$",  # causal masks
    r"(^|\.)embed_positions\.(weights|_float_tensor)$",  # sines
    r"(^|\.)num_batches_tracked$",
    r"(^|\.)(encoder|decoder)\.version$",
    r"(^|\.)_extra_state$",
)
NEXT_TOKENS = "num_nextn_predict_layers"
"""Config key: so many blocks behind the last one guess further tokens, which no transformers class does."""
SWITCHES = "attention_bias, qkv_bias, mlp_bias, use_bias or the like"


@dataclass(frozen=True)
class LeftOver:
    """What a file holds and the model does not.

    Attributes:
        others: names that go without doing harm to what the model computes, as far as names tell.
        biases: of modules that the model has without one. blocks: of blocks behind the last one of a list.
    """

    others: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()


def left_over(model: PreTrainedModel, names: Mapping[str, str]) -> LeftOver:
    """Sort the names that found no place in ``model``; harmless ones are left out.

    Args:
        model: as the config says, on any device.
        names: in the file -> in the model, as transformers would rename them; with or without the base model's prefix.
    """
    known = (*HARMLESS, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()))
    harmless = re.compile("|".join(f"(?:{pattern})" for pattern in known))
    guesses = int(getattr(model.config.get_text_config(), NEXT_TOKENS, 0) or 0)
    others: list[str] = []
    biases: list[str] = []
    blocks: list[str] = []
    for name, renamed in names.items():
        places = list(_places(renamed, model.base_model_prefix))
        beyond = max((_beyond(model, place) for place in places), default=0)
        if any(_lacks_bias(model, place) for place in places):
            biases.append(name)
        elif harmless.search(name) or 0 < beyond <= guesses:
            continue
        else:
            (blocks if beyond else others).append(name)
    return LeftOver(tuple(others), tuple(biases), tuple(blocks))


def _places(name: str, prefix: str) -> Iterator[str]:
    """Where a stored tensor might belong."""
    yield from (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))


def _lacks_bias(model: nn.Module, name: str) -> bool:
    """Whether this is the bias of a module that has a weight and no bias."""
    owner, _, leaf = name.rpartition(".")
    module = _module(model, owner)
    return leaf == "bias" and isinstance(getattr(module, "weight", None), Tensor)


def _beyond(model: nn.Module, name: str) -> int:
    """How far behind the last block of a list the one that this tensor is of stands; 0 if it is of none."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        blocks = _module(model, ".".join(parts[:i])) if part.isdecimal() else None
        if isinstance(blocks, nn.ModuleList) and int(part) >= len(blocks):
            return int(part) - len(blocks) + 1
    return 0


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
