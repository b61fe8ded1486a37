"""Fast versions of ops, found by device and loaded at its first use.

A module of ``nybble/kernels/`` belongs to the device that its name begins with (``cpu``, ``cuda_scaled`` ...; ``gpu``
stands for ``cuda``, as torch calls AMD's GPUs too); other packages add theirs as entry points of the group
``nybble.kernels``, named alike. Importing one registers its kernels with the ops (``op.register_kernel(device)``); what
begins with ``_`` is shared among them. One that fails (Triton is missing, a plug-in is broken) is named in a warning
and left out; without any, every number stays the same.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from nybble.core.registry import plugins

FOLDER = "nybble.kernels"
ALIASES = {"gpu": "cuda"}
Import = Callable[[], Any]


def kernel_modules() -> dict[str, Import]:
    """What imports each module, by name; nothing is imported yet."""
    folder = importlib.util.find_spec(FOLDER)
    places = (folder.submodule_search_locations or ()) if folder else ()
    found: dict[str, Import] = {
        m.name: partial(importlib.import_module, f"{FOLDER}.{m.name}")
        for m in pkgutil.iter_modules(places)
        if not m.name.startswith("_")
    }
    return found | {entry.name: entry.load for entry in plugins().select(group=FOLDER)}


def load_at_first_use(ops: Iterable[Any]) -> None:
    """Let the first call of any of ``ops`` (torch.library custom ops) on a device load the kernels for it."""
    waiting: dict[str, dict[str, Import]] = {}
    for name, load in sorted(kernel_modules().items()):
        device = name.partition("_")[0]
        waiting.setdefault(ALIASES.get(device, device), {})[name] = load
    ops = list(ops)
    for device in list(waiting):
        try:
            for op in ops:
                op.register_kernel(device)(_first_use(op, device, waiting))
        except RuntimeError as error:
            _warn(dict.fromkeys(waiting.pop(device), error))


def _first_use(op: Any, device: str, waiting: dict[str, dict[str, Import]]) -> Callable[..., Tensor]:
    """Stands for ``op`` on ``device`` until a kernel takes its place; where none does, it is the readable version."""

    def run(*args: Any) -> Tensor:
        modules = waiting.pop(device, None)
        if modules is None:
            reference: Tensor = op._init_fn(*args)
            return reference
        failed: dict[str, Exception] = {}
        for name, load in modules.items():
            try:
                load()
            except Exception as error:  # whatever a plug-in raises
                failed[name] = error
        if failed:
            _warn(failed)
        found: Tensor = op(*args)
        return found

    return run


_said: set[str] = set()  # each family of ops waits by itself, and a broken module fails for all of them


def _warn(failed: Mapping[str, Exception]) -> None:
    failed = {name: error for name, error in failed.items() if name not in _said}
    _said.update(failed)
    if not failed:
        return
    reasons = "; ".join(f"{name} ({type(error).__name__}: {error})" for name, error in failed.items())
    warnings.warn(
        f"kernels that can't be loaded: {reasons}. Without them the numbers are the same and take longer.",
        RuntimeWarning,
        stacklevel=3,
    )
