"""An optimizer's state dict as named tensors and one JSON text: what a safetensors file can hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nybble.core.errors import FileError, UsageError
from nybble.optim._sharded import SHARDS, is_dtensor

_KEY = "nybble.optim"


def flatten(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state dict as ``(tensors, metadata)``: ``safetensors.torch.save_file(tensors, path, metadata)``.

    Returns:
        tensors: under ``<parameter>.<state>`` or, of a quantized state, ``<parameter>.<state>.<codes, scale ...>``.
        metadata: one entry, JSON, with all that isn't a tensor.

    Raises:
        UsageError: the states are sharded.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for index, entry in state_dict["state"].items():
        rest[str(index)] = {}
        for name, value in entry.items():
            parts = value if isinstance(value, Mapping) else {"": value}
            if SHARDS in parts or any(map(is_dtensor, parts.values())):
                raise UsageError(f"{index}.{name} is sharded; save such states by torch.distributed.checkpoint.")
            tensors |= {
                f"{index}.{name}{key and '.'}{key}": t.contiguous() for key, t in parts.items() if isinstance(t, Tensor)
            }
            rest[str(index)][name] = {key: x for key, x in parts.items() if not isinstance(x, Tensor)}
    groups = [dict(group) for group in state_dict["param_groups"]]
    return tensors, {_KEY: json.dumps({"state": rest, "param_groups": groups}, default=float)}


def unflatten(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of :func:`flatten`; tuples of the groups (betas) come back as lists.

    Raises:
        FileError: the metadata are not :func:`flatten`'s, or a tensor is missing.
    """
    try:
        text = json.loads(metadata[_KEY])
        state: dict[int, dict[str, Any]] = {}
        for index, entry in text["state"].items():
            state[int(index)] = {}
            for name, rest in entry.items():
                prefix = f"{index}.{name}."
                inside = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
                state[int(index)][name] = {**rest, **inside} if rest else tensors[f"{index}.{name}"]
        return {"state": state, "param_groups": list(text["param_groups"])}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"these are not an optimizer's flattened states ({type(error).__name__}: {error}).") from error
