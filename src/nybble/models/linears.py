"""Which modules multiply their input by a weight, and which way round they keep it."""

from __future__ import annotations

from torch import Tensor, nn

from nybble.core.errors import ModelError


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``: a linear layer (GPT-2's) whose weight is stored ``[in, out]``."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_matmul(module: nn.Module, more: tuple[type[nn.Module], ...] = ()) -> bool:
    """Whether ``module`` is a linear layer: ``nn.Linear``, transformers' ``Conv1D``, or one of ``more``."""
    return isinstance(module, (nn.Linear, *more)) or is_conv1d(module)


def weight_of(block: nn.Module, name: str) -> tuple[Tensor, int]:
    """A matmul weight by name, and which of its dimensions is the input's.

    Args:
        block: the module that ``name`` is relative to.
        name: a module with a ``weight`` (linear, Conv1D, a router), or a fused 3-D expert parameter.

    Returns:
        The parameter and its input dimension.

    Raises:
        ModelError: no such weight.
    """
    owner, _, leaf = name.rpartition(".")
    parent = block.get_submodule(owner)
    found = getattr(parent, leaf, None)
    if isinstance(found, nn.Parameter):
        return found, -2 if getattr(parent, "is_transposed", False) else -1
    weight = getattr(found, "weight", None)
    if not isinstance(found, nn.Module) or not isinstance(weight, Tensor):
        raise ModelError(f"{type(block).__name__} has no matmul weight called {name!r}.")
    return weight, 0 if is_conv1d(found) else -1
