"""Every operation once: schema, fake and a reference one can read.

``kernels/`` adds fast versions by name, changing no number.
"""

from __future__ import annotations

import importlib
import pkgutil

from nybble.ops import blocks, rounding  # noqa: F401  the ops stand before their fast versions are looked for


def _load_kernels() -> None:
    """Import what ``nybble.kernels`` holds, if it is there; each module registers itself under the names of ops."""
    try:
        folder = importlib.import_module("nybble.kernels")
    except ModuleNotFoundError:
        return
    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"nybble.kernels.{module.name}")


_load_kernels()
