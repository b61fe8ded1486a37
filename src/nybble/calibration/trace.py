"""Seeing what a model does: the arguments each block is called with, and which weights read the same tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError
from nybble.data.kinds import data_kind
from nybble.models.adapter import Adapter, adapter_for
from nybble.nn.kinds import Kind, kind_of


@dataclass(frozen=True, kw_only=True)
class BlockCall:
    """How the model calls one block: everything but the hidden states, which change from block to block.

    Attributes:
        index: which block of its stack.
        args, kwargs: the other arguments (masks, position embeddings), ready to be passed on. ``args`` follow the
            hidden states.
        keyword: the hidden states' keyword, or None where they are the first positional argument.
        hidden: what block 0 was given; None for the others.
        mask: bool [batch, tokens], which tokens are real; None where all are.
        carries: as the adapter's. carried: what the first block gave, shared by all calls of a batch.
    """

    index: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    keyword: str | None
    hidden: Tensor | None
    mask: Tensor | None = None
    carries: tuple[tuple[int, int], ...] = ()
    carried: dict[int, Tensor] = field(default_factory=dict)

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Call ``block`` as the model would, on these hidden states; return its hidden states."""
        named = dict(self.kwargs) if self.keyword is None else {**self.kwargs, self.keyword: hidden}
        carried = self.carried if self.index else {}
        args = [carried.get(place, argument) for place, argument in enumerate(self.args)]
        output = block(*args, **named) if self.keyword is not None else block(hidden, *args, **named)
        if self.index == 0:
            self.carried.update({to: output[place] for place, to in self.carries if output[place] is not None})
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


class _AllSeenError(Exception):
    """Stops the model's forward once the last block was called: final norm and head aren't needed."""


def _split(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], keep: bool) -> tuple[Tensor, BlockCall]:
    keyword = None if args else "hidden_states"
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise ModelError(f"block {index} is not called with hidden states first, so it can't be replayed.")
    rest = {key: value for key, value in kwargs.items() if key != keyword}
    call = BlockCall(index=index, args=args[1:], kwargs=rest, keyword=keyword, hidden=hidden if keep else None)
    return hidden, call


def _record(
    model: nn.Module,
    stacks: Sequence[Sequence[nn.Module]],
    inputs: Mapping[str, Any],
    end: Tensor | None,
    width: int,
) -> tuple[list[BlockCall], bool]:
    """One forward through recorders; of two stacks the first passes ``end`` on.

    ``width``: how long a tuple blocks return, the hidden states first; 0 for the hidden states alone.

    Returns the calls of the last stack, and whether all of its blocks were called once, in order, with the same shape.
    """
    calls: list[BlockCall] = []
    shapes: set[torch.Size] = set()
    blocks = stacks[-1]

    def recorder(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, call = _split(index, args, kwargs, keep=index == 0)
            calls.append(call)
            shapes.add(hidden.shape)
            if len(calls) == len(blocks):
                raise _AllSeenError
            return _returned(hidden, width)

        return forward

    def passed(*args: Any, **kwargs: Any) -> Any:
        return _returned(end, width)

    with ExitStack() as undo:
        for stack in stacks:
            for index, block in enumerate(stack):
                # The instance's forward, not a swapped module: models read attributes of their blocks.
                before = block.__dict__.get("forward")
                block.forward = recorder(index) if stack is blocks else passed
                undo.callback(_restore_forward, block, before)
        with suppress(_AllSeenError):
            model(**inputs, **({"use_cache": False} if "input_ids" in inputs else {}))
    in_order = [call.index for call in calls] == list(range(len(blocks)))
    return calls, in_order and len(shapes) == 1


def _returned(hidden: Tensor | None, width: int) -> Any:
    return (hidden, *[None] * (width - 1)) if width else hidden


def _restore_forward(block: nn.Module, before: Any) -> None:
    del block.forward
    if before is not None:
        block.forward = before


@torch.no_grad()
def capture_block_calls(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Tensor],
    *,
    adapter: Adapter | None = None,
    end: Tensor | None = None,
) -> list[BlockCall]:
    """Run the model once with every block replaced by a recorder that passes its hidden states on unchanged.

    No block computes anything, so block weights may stay on the meta device; embeddings must be real.

    Args:
        model: in eval mode.
        inputs: what the model is called with, by argument, or the token ids alone; the first dimension is the batch's.
        adapter: default, the model's.
        end: of an encoder-decoder, what the last encoder block gave: then it is the decoder's blocks that are recorded.

    Returns:
        One call a block, in order; the first carries the hidden states it was given.

    Raises:
        ModelError: the blocks aren't called once each, in order, with hidden states first.
    """
    given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    adapter = adapter or adapter_for(model)
    names = adapter.stack_names(model)[: 1 if end is None else 2]
    stacks = [[model.get_submodule(name) for name in stack] for stack in names]
    problem: Exception | None = None
    # Most blocks return a tensor, some a tuple that the model takes [0] of. Given a tensor, the latter kind of model
    # drops the batch dimension, which the next recorder sees: so try a tensor first, then a tuple.
    carries = adapter.carries
    for width in (max(place for place, _ in carries) + 1,) if carries else (0, 1):
        try:
            calls, good = _record(model, stacks, given, end, width)
        except ModelError:
            raise
        except Exception as error:
            problem = error
            continue
        if good:
            if adapter.convolutional and calls[0].hidden is not None:
                # The network reads its input as it is; a wrapper may have moved it to where its weights aren't yet.
                dtype = next(stacks[0][0].parameters()).dtype
                calls[0] = replace(calls[0], hidden=next(iter(given.values())).to(dtype))
            real = data_kind(adapter.reads).real(given) if end is None else None
            shared: dict[int, Tensor] = {}
            return [replace(call, mask=real, carries=carries, carried=shared) for call in calls]
    raise ModelError(
        f"{type(model).__name__} doesn't call its {len(stacks[-1])} blocks one after the other on its hidden states."
    ) from problem


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
def trace_groups(block: nn.Module, call: BlockCall, hidden: Tensor | None = None) -> Trace:
    """Run a block once and group its matmul weights by the tensor they read.

    Args:
        block: with real weights.
        call: how it is called.
        hidden: its hidden states; default, those that ``call`` carries.
    """
    start = call.hidden if hidden is None else hidden
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
        call.run(block, start)
    called = {name for names in groups.values() for name in names}
    inside = {f"{name}.{leaf}" for name, (module, _) in watched.items() for leaf, _ in module.named_parameters()}
    other = [n for n, p in block.named_parameters() if p.ndim >= 2 and n not in inside]
    return Trace(
        groups=tuple(tuple(names) for names in groups.values()),
        uncalled=tuple(name for name in watched if name not in called),
        other=tuple(other),
    )
