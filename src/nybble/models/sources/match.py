"""Checkpoint names against module names.

Most checkpoints use the model's own names. Some leave off or add the base model's prefix (``wte.weight`` for
``transformer.wte.weight``), some have a renamed head; those are still one tensor to one tensor, so they stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from nybble.core.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Match:
    """How to serve a model's tensors from a file.

    ``files``: model name -> name in the file, one entry for each tensor. ``ties``: a tied name -> the model name in
    ``files`` or ``missing`` that it shares its tensor with. ``missing``: model names that the file can't serve, one for
    each tensor. ``unused``: names in the file that no name of the model is served from.
    """

    files: Mapping[str, str]
    ties: Mapping[str, str]
    missing: tuple[str, ...]
    unused: tuple[str, ...] = ()


def match_names(
    expected: Mapping[str, Tensor], stored: Mapping[str, tuple[int, ...]], prefix: str, renames: Mapping[str, str]
) -> Match:
    """Find the stored tensor for each expected one.

    Args:
        expected: the skeleton's tensors by name; tied ones are the same object.
        stored: shapes by the name in the file.
        prefix: the model's ``base_model_prefix``.
        renames: leading part of a name in old files -> what it is called now (``embed_out.`` -> ``lm_head.``).

    Raises:
        ModelError: a tensor is there with another shape than the config says.
    """
    by_model_name: dict[str, str] = {}
    for name in stored:
        for old, new in (*renames.items(), ("", "")):
            renamed = new + name.removeprefix(old) if name.startswith(old) else name
            for candidate in (renamed, f"{prefix}.{renamed}", renamed.removeprefix(f"{prefix}.")):
                if candidate in expected:
                    by_model_name.setdefault(candidate, name)
    first: dict[int, str] = {}
    files: dict[str, str] = {}
    ties: dict[str, str] = {}
    missing: list[str] = []
    # Stable: stored names first, and a head, which may have its tensor from the base model, last.
    for name in sorted(expected, key=lambda n: (n not in by_model_name, not n.startswith(f"{prefix}."))):
        tensor = expected[name]
        if first.setdefault(id(tensor), name) != name:
            ties[name] = first[id(tensor)]
        elif name in by_model_name:
            files[name] = by_model_name[name]
        else:
            missing.append(name)
    for name, file_name in files.items():
        if tuple(expected[name].shape) != stored[file_name]:
            raise ModelError(
                f"{file_name} has shape {list(stored[file_name])}; the config says {list(expected[name].shape)}."
            )
    used = set(by_model_name.values())
    unused = tuple(name for name in stored if name not in used)
    return Match(files=files, ties=ties, missing=tuple(missing), unused=unused)
