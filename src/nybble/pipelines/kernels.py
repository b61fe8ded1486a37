"""How the packed weights of a folder are multiplied with on this machine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from nybble.nn.packed import Packed
from nybble.nn.swap import BY_KERNELS
from nybble.pipelines.load import load_with_origin


def kernels_of(folder: str | Path) -> list[dict[str, Any]]:
    """Load a quantized model on the CPU and ask for each packed weight.

    Returns:
        a row for what is alike: ``weights``, how many; ``format``; ``kernel``, its name, or None; ``reason``, why there
        is none.
    """
    return kernels_of_model(load_with_origin(folder, packed=True)[0])


def kernels_of_model(model: nn.Module) -> list[dict[str, Any]]:
    """The same of a loaded model, where it is."""
    rows: Counter[tuple[str, str | None, str]] = Counter()
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Packed):
            continue
        fast, said = layer.how() if isinstance(layer, BY_KERNELS) else (False, f"a {type(layer).__name__}")
        rows[(str(weight.spec.get("format", weight.spec["kind"])), said if fast else None, "" if fast else said)] += 1
    return [
        {"weights": count, "format": name, "kernel": kernel, "reason": reason}
        for (name, kernel, reason), count in rows.most_common()
    ]
