"""The proof that nothing between input and logits is a float: operations of a run, and the types of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nybble.nn.integer.network import IntegerNetwork


@dataclass(frozen=True)
class Operation:
    """``name`` of torch's, and the types of what it read and gave, in order."""

    name: str
    inputs: tuple[torch.dtype, ...]
    outputs: tuple[torch.dtype, ...]

    @property
    def integer(self) -> bool:
        """Whether no tensor, and no number that came with it, is a float."""
        return not any(dtype.is_floating_point or dtype.is_complex for dtype in (*self.inputs, *self.outputs))


class Dtypes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what runs while it is active: ``with Dtypes() as trace: ...; trace.operations``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.operations.append(Operation(str(func), _types((args, kwargs)), _types(found)))
        return found


def _types(tree: Any) -> tuple[torch.dtype, ...]:
    leaves = tree_leaves(tree)
    tensors = [leaf.dtype for leaf in leaves if isinstance(leaf, Tensor)]
    return (*tensors, *(torch.float64 for leaf in leaves if isinstance(leaf, float)))


@torch.no_grad()
def operations(network: IntegerNetwork, x: Tensor) -> list[Operation]:
    """Of a run from the input's codes to the logits' codes; ``x`` is the input in floats."""
    q = network.entrance.codes(x)
    with Dtypes() as trace:
        network.run(q)
    found: list[Operation] = trace.operations
    return found
