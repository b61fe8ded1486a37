"""Which weights of a block read the same input: found by running it once."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.calibration.trace import BlockCall, Tensors
from nybble.core.errors import ModelError, NybbleError
from nybble.nn.kinds import Kind, kind_of


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Which weights of a block read the same input.

    Attributes:
        groups: module names, in the order of their first call; those in one group read the same tensor (q, k and v).
        uncalled: modules with a matmul weight that the block never called.
        other: parameters of two or more dimensions that belong to neither (a router's weight): seen, not traced.
    """

    groups: tuple[tuple[str, ...], ...]
    uncalled: tuple[str, ...]
    other: tuple[str, ...]


def _key(tensor: Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, version


@torch.no_grad()
def trace_groups(block: nn.Module, call: BlockCall, given: Tensors | None = None) -> Trace:
    """Run a block once and group its matmul weights by the tensor they read.

    Args:
        block: with real weights.
        call: how it is called.
        given: what goes into it by name; default, what ``call`` carries.
    """
    start = call.start if given is None else given
    if start is None:
        raise ModelError(f"block {call.index}: hidden states are needed to trace it; only block 0's are kept.")
    watched: dict[str, tuple[nn.Module, Kind]] = {}
    for name, module in block.named_modules():
        kind = kind_of(module)
        if kind is not None and (kind.shares_input or kind.fused):
            watched[name] = module, kind
    groups: dict[tuple[Any, ...], list[str]] = {}
    alive: list[Tensor] = []  # an input freed during the run could lend its address to another
    with ExitStack() as undo:
        for name, (module, kind) in watched.items():

            def note(
                _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name, kind: Kind = kind
            ) -> None:
                tensor = kind.reads(args, kwargs)
                alive.append(tensor)
                members = groups.setdefault(_key(tensor), [])
                if name not in members:
                    members.append(name)

            handle = module.register_forward_pre_hook(note, with_kwargs=True)
            undo.callback(handle.remove)
        try:
            call.run(block, start)
        except (NybbleError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            raise ModelError(
                f"a {type(block).__name__} can't be run by itself as the model runs it ({type(error).__name__}: {error}"
                "), so it can't be calibrated; use a recipe without data."
            ) from error
    called = {name for names in groups.values() for name in names}
    inside = {f"{name}.{leaf}" for name, (module, _) in watched.items() for leaf, _ in module.named_parameters()}
    other = [n for n, p in block.named_parameters() if p.ndim >= 2 and n not in inside]
    return Trace(
        groups=tuple(tuple(names) for names in groups.values()),
        uncalled=tuple(name for name in watched if name not in called),
        other=tuple(other),
    )
