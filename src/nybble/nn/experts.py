"""Fused expert weights ([experts, out, in] in one parameter) as one QTensor an expert.

Which experts run is in the values that the router gives, where no compiler can follow. So a module of packed experts is
one operator for ``torch.compile``, behind which runs what runs without it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nybble.nn.packed import Packed
from nybble.nn.routing import DOWN
from nybble.qtensor import QTensor

IMPLEMENTATION = "nybble"
"""What transformers calls :func:`run_experts` in a config."""
_OWNERS: weakref.WeakValueDictionary[str, Owner] = weakref.WeakValueDictionary()
_COUNT = itertools.count()


class Owner:
    """The module of experts that a packed parameter is in, which a copy of that module has to find anew.

    ``key``: names it in a compiled graph.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self.key = weakref.ref(module), str(next(_COUNT))
        _OWNERS[self.key] = self

    def __call__(self) -> nn.Module:
        """The module."""
        found = self._module()
        assert found is not None
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        return Owner(memo.get(id(self()), self()))

    def __reduce__(self) -> tuple[Any, ...]:
        return Owner, (self(),)


def run_experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls instead of a module of experts: its own forward, one operator while compiling.

    Gradients need the forward itself, at which a graph breaks.

    Args:
        module: with packed experts.
        hidden_states: [tokens, width].
        top_k_index: int64 [tokens, k], the experts of each token.
        top_k_weights: [tokens, k], theirs.
    """
    learns = torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)
    down: Any = getattr(module, DOWN)
    if torch.compiler.is_compiling() and not learns and isinstance(down, PackedExperts) and down.owner is not None:
        called: Tensor = experts(hidden_states, top_k_index, top_k_weights, down.owner.key)
        return called
    return _plain(module, hidden_states, top_k_index, top_k_weights)


def _plain(module: nn.Module, *args: Tensor) -> Tensor:
    """What the module's class does, below transformers' choice of an implementation."""
    forward: Any = type(module).forward
    found: Tensor = forward.__wrapped__(module, *args)
    return found


@torch.library.custom_op("nybble::experts", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def experts(hidden: Tensor, index: Tensor, gates: Tensor, key: str) -> Tensor:
    """What a module of experts gives; ``key``: its :class:`Owner`'s, else as :func:`run_experts`."""
    return _plain(_OWNERS[key](), hidden, index, gates)


@experts.register_fake
def _(hidden: Tensor, index: Tensor, gates: Tensor, key: str) -> Tensor:
    return torch.empty_like(hidden)


class PackedExperts(nn.Module):
    """Stands where a fused parameter stood: ``module.gate_up_proj[e]`` dequantizes expert e's matrix.

    Args:
        experts: a QTensor [out, in] for each expert.
        dtype: of the matrices that come out; ``.to(dtype)`` changes it.
        transposed: the model keeps [in, out], so that is what comes out.
        owner: the module that it is in; without one that can't be compiled.
    """

    def __init__(
        self,
        experts: Sequence[QTensor],
        dtype: torch.dtype,
        *,
        transposed: bool = False,
        owner: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.transposed = transposed
        self.owner = None if owner is None else Owner(owner)
        self.experts = nn.ModuleList(Packed(expert, dtype) for expert in experts)

    @property
    def _first(self) -> Packed:
        first = self.experts[0]
        assert isinstance(first, Packed)
        return first

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices that come out."""
        assert self._first.dtype is not None
        return self._first.dtype

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._first.device

    @property
    def shape(self) -> torch.Size:
        """Of the fused parameter."""
        rows, columns = self._first.shape
        return torch.Size((len(self.experts), *((columns, rows) if self.transposed else (rows, columns))))

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        matrix: Tensor = self.experts[int(expert)](self.dtype)
        return matrix.T if self.transposed else matrix
