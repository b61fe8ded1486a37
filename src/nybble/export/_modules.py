"""Which modules a checkpoint of plain matrices has a place for: asked before quantizing, and before writing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from nybble.export._names import parts_of
from nybble.models.sources.layouts._ct_args import CannotError
from nybble.nn.kinds import Target
from nybble.nn.routing import is_transposed

_FLOAT = "all weights of this kind in float"


def check_module(module: nn.Module) -> None:
    """Refuse what is neither a linear layer nor an embedding.

    Raises:
        CannotError: it is not.
    """
    if not isinstance(module, nn.Linear | nn.Embedding):
        name = type(module).__name__
        raise CannotError(f"a {name}", f"nn.Linear and nn.Embedding; {_FLOAT} (--ignore {name})")


def check_apart(model: Any, name: str, matrices: int, rows: int, transposed: bool) -> None:
    """Refuse experts that the checkpoints of their family have in one tensor.

    Args:
        model: may be on the meta device.
        name: of the fused parameter.
        matrices: how many it has.
        rows: of each.
        transposed: whether the parameter has each as [in, out].

    Raises:
        CannotError: they have no names of their own.
    """
    if not all(part.name.endswith(".weight") for part in parts_of(model, name, matrices, rows, transposed)):
        raise CannotError("experts that this family keeps in one tensor", f"{_FLOAT} (--ignore Experts)")


def without_place(model: Any, targets: Mapping[str, Target]) -> dict[str, CannotError]:
    """Of a float model, what a scheme may quantize and such a checkpoint has no place for: name -> why."""
    found: dict[str, CannotError] = {}
    for name, target in targets.items():
        kind = target.kind
        if kind.reads_another or kind.operands:
            continue
        module = model.get_submodule(target.module)
        try:
            if kind.fused:
                check_apart(model, name, target.matrices, target.shape[0], is_transposed(module))
            else:
                check_module(module)
        except CannotError as error:
            found[name] = error
    return found
