"""What a layer's name says: its kind, its depth; and the format that a quantizer line begins with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Path = tuple[str, ...]


def kinds_of(names: Iterable[str]) -> dict[str, str]:
    """The kind of each layer: its name without numbers, of that the last part and what it takes to tell it from others.

    >>> list(kinds_of(["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.mlp.c_proj"]).values())
    ['c_attn', 'attn.c_proj', 'mlp.c_proj', 'mlp.c_proj']
    >>> list(kinds_of(["layer.0.attention.output.dense", "layer.0.output.dense", "layer.1.output.dense"]).values())
    ['attention.output.dense', 'layer.output.dense', 'layer.output.dense']
    """
    paths = {name: _path(name) for name in names}
    labels = _labels(sorted(set(paths.values())))
    return {name: labels[path] for name, path in paths.items()}


def _path(name: str) -> Path:
    """The parts of a name that aren't numbers; those that a number follows, the lists, end with a star.

    >>> _path("model.layers.3.mlp.experts.gate_up_proj.experts.7"), _path("layer1.0.conv1")
    (('model', 'layers*', 'mlp', 'experts', 'gate_up_proj'), ('layer*', 'conv1'))
    >>> _path("layer.0.attention.self.matmuls.query")
    ('layer*', 'attention', 'self', 'query in matmul')
    """
    parts = [part for part in re.sub(r"\d*(\.\d+)+(?=\.|$)", "*", name).split(".") if not part.isdigit()]
    while len(parts) > 1 and parts[-1] in ("experts*", "weight"):
        parts.pop()
    if parts[-2:-1] == ["matmuls"]:  # an operand of attention, not the layer that makes it
        parts[-2:] = [f"{parts[-1]} in matmul"]
    return tuple(parts) or (name,)


def _labels(paths: Sequence[Path], back: int = 1, end: Path = ()) -> dict[Path, str]:
    """A short text for each path, no two alike: of the lists only those in which paths differ.

    Args:
        paths: distinct, alike in the last ``back - 1`` parts.
        back: which part, from the end, is looked at.
        end: those of the later parts that belong to the text.
    """
    if end and len(paths) == 1:
        return {paths[0]: ".".join(end).replace("*", "")}
    groups: dict[Path, list[Path]] = {}
    for path in paths:
        part = path[len(path) - back : len(path) - back + 1] if back <= len(path) else ()
        groups.setdefault(part, []).append(path)
    found: dict[Path, str] = {}
    for part, group in groups.items():
        alike = len(groups) == 1 and part[0].endswith("*") and bool(end)
        found |= _labels(group, back + 1, end if alike else (*part, *end))
    return found


def depth_of(name: str) -> int | None:
    """The first number in a name, the block's; None outside the blocks."""
    return next((int(part) for part in name.split(".") if part.isdigit() and len(part) < 7), None)


def format_of(line: str | None) -> str:
    """The format that a quantizer line begins with."""
    return line.split()[0] if line and line.split() else "float"
