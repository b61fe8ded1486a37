"""Seeing what a model does: the arguments each block is called with, and which weights read the same tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError, NybbleError
from nybble.data.kinds import data_kind
from nybble.models.adapter import Adapter, Flow, adapter_for
from nybble.nn.kinds import Kind, kind_of
from nybble.nn.kv_model import no_cache

HIDDEN = "hidden"
"""Name of the hidden states among the tensors that go from block to block."""
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class BlockCall:
    """How the model calls one block: everything but the tensors that change from block to block.

    Attributes:
        index: which block of its stack.
        args, kwargs: the other arguments (masks, position embeddings), ready to be passed on. ``args`` follow the
            hidden states.
        keyword: the hidden states' keyword, or None where they are the first positional argument.
        start: what block 0 was given, by name; None for the others.
        mask: bool [batch, tokens], which tokens are real; None where all are.
        flows: what goes from block to block beside the hidden states (:class:`nybble.models.adapter.Flow`).
    """

    index: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    keyword: str | None
    start: Tensors | None
    mask: Tensor | None = None
    flows: tuple[Flow, ...] = ()

    def run(self, block: nn.Module, given: Tensors) -> dict[str, Tensor]:
        """Call ``block`` as the model would, on these tensors; return those in front of the next block."""
        named, args = dict(self.kwargs), list(self.args)
        for flow in self.flows:
            if flow.name in given and not (flow.once and self.index == 0):
                if isinstance(flow.takes, int):
                    args[flow.takes] = given[flow.name]
                else:
                    named[flow.takes] = given[flow.name]
        hidden = given[HIDDEN]
        output = (
            block(hidden, *args, **named) if self.keyword is None else block(*args, **{**named, self.keyword: hidden})
        )
        if not isinstance(output, tuple | list):
            return {**given, HIDDEN: output}
        found = {**given, HIDDEN: output[_place(self.flows)]}
        for flow in self.flows:
            given_on = output[flow.gives] if flow.gives < len(output) else None
            if (self.index == 0 or not flow.once) and given_on is not None:
                found[flow.name] = given_on
        return found


@dataclass(frozen=True, kw_only=True)
class WholeCall(BlockCall):
    """A call of a model that is one block (:attr:`~nybble.models.adapter.Adapter.whole`).

    ``inputs``: what the model is called with beside its main input, ``keyword``, which is what goes in.
    """

    inputs: Mapping[str, Tensor]

    def run(self, block: nn.Module, given: Tensors) -> dict[str, Tensor]:
        """Call the model (``block``); returns its logits, or what it has instead."""
        assert self.keyword is not None
        inputs = {self.keyword: given[HIDDEN], **self.inputs}
        return {HIDDEN: _main_output(block(**inputs, **no_cache(block)))}


def _main_output(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    named = [getattr(output, name, None) for name in ("logits", "last_hidden_state")]
    rest = output.values() if isinstance(output, Mapping) else output
    return next(value for value in (*named, *rest) if isinstance(value, Tensor))


class ChainError(ModelError):
    """Blocks that can't be walked one after the other: the model does more between them, or doesn't call them so."""


def _place(flows: Sequence[Flow]) -> int:
    """Where in the tuple that a block returns its hidden states are: at the first place that no other flow takes."""
    taken = {flow.gives for flow in flows}
    return next(place for place in range(len(taken) + 1) if place not in taken)


_MORE = object()
"""Stands in a block's output where something else than hidden states and flows would be."""


class _AllSeenError(Exception):
    """Stops the model's forward once the last block was called: final norm and head aren't needed."""


def _split(
    index: int, args: tuple[Any, ...], kwargs: dict[str, Any], flows: tuple[Flow, ...], keep: bool
) -> tuple[Tensor, BlockCall]:
    keyword = None if args else "hidden_states"
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise ChainError(f"block {index} is not called with hidden states first, so it can't be replayed.")
    rest = {key: value for key, value in kwargs.items() if key != keyword}
    after = args[1:]
    start = None
    if keep:
        others = {
            f.name: after[f.takes] if isinstance(f.takes, int) else rest.get(f.takes) for f in flows if not f.once
        }
        start = {HIDDEN: hidden, **{name: tensor for name, tensor in others.items() if isinstance(tensor, Tensor)}}
    call = BlockCall(index=index, args=after, kwargs=rest, keyword=keyword, start=start, flows=flows)
    return hidden, call


def _record(
    model: nn.Module,
    stacks: Sequence[Sequence[nn.Module]],
    inputs: Mapping[str, Any],
    end: Tensor | None,
    flows: tuple[Flow, ...],
    width: int,
    behind: Sequence[nn.Module] | None,
) -> tuple[list[BlockCall], bool]:
    """One forward through recorders; of two stacks the first passes ``end`` on.

    ``width``: how long a tuple blocks return; 0 for the hidden states alone. ``behind``: modules that are called when
    all blocks were, if at all: raise ChainError where the model does something to the hidden states between two blocks,
    or calls the blocks again. None to stop at the last block.

    Returns the calls of the last stack, and whether all of its blocks were called once, in order, with the same shape.
    """
    calls: list[BlockCall] = []
    shapes: set[torch.Size] = set()
    blocks = stacks[-1]
    before: list[Tensor] = []

    def recorder(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if any(value is _MORE for value in (*args, *kwargs.values())):
                raise ChainError(
                    f"the blocks of {type(model).__name__} hand on more than hidden states, and no adapter says what."
                )
            if len(calls) == len(blocks):
                raise ChainError(f"{type(model).__name__} calls its {len(blocks)} blocks more than once.")
            hidden, call = _split(index, args, kwargs, flows, keep=index == 0)
            calls.append(call)
            shapes.add(hidden.shape)
            if behind is not None:
                if before and before[0].shape == hidden.shape and not _equal(before.pop(), hidden):
                    raise ChainError(f"{type(model).__name__} does more between its blocks than hand their outputs on.")
                before[:] = [hidden.clone()]
            if len(calls) == len(blocks) and behind is None:
                raise _AllSeenError
            values = {f.gives: call.args[f.takes] if isinstance(f.takes, int) else call.kwargs.get(f.takes)
                      for f in flows if not f.once}  # fmt: skip
            return returned(hidden, width, flows, values, _MORE if not flows and width > 1 else None)

        return forward

    def passed(*args: Any, **kwargs: Any) -> Any:
        return returned(end, width, flows, {})

    def stop(*_: Any, **__: Any) -> Any:
        raise _AllSeenError

    with ExitStack() as undo:
        for stack in stacks:
            for index, block in enumerate(stack):
                replace_forward(block, recorder(index) if stack is blocks else passed, undo)
        for module in behind or ():
            replace_forward(module, stop, undo)
        try:
            model(**inputs, **no_cache(model))
        except _AllSeenError:
            pass
        except Exception as error:  # behind the last block is much that needs more than recorders give
            if isinstance(error, ChainError) or len(calls) < len(blocks):
                raise
    in_order = [call.index for call in calls] == list(range(len(blocks)))
    return calls, in_order and len(shapes) == 1


def _behind(model: nn.Module, adapter: Adapter, stack: int) -> list[nn.Module]:
    """What is called when this many stacks are done: the next one's blocks, or the head, whose logits are large."""
    names = [adapter.head, *(name for names in adapter.stack_names(model)[stack:] for name in names)]
    modules = dict(model.named_modules())
    return [modules[name] for name in names if name in modules]  # an adapter's head isn't there in all of its classes


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num())


def returned(
    hidden: Tensor | None, width: int, flows: Sequence[Flow], values: Mapping[int, Any], more: Any = None
) -> Any:
    """What a block that computes nothing returns: the hidden states, or a tuple of ``width`` with them in place.

    ``more``: what is at places that neither they nor flows have.
    """
    if not width:
        return hidden
    found = [values.get(place, more) for place in range(width)]
    found[_place(flows)] = hidden
    return tuple(found)


def replace_forward(block: nn.Module, forward: Any, undo: ExitStack) -> None:
    """Let ``forward`` stand for the block's until ``undo``.

    The instance's forward, not a swapped module: models read attributes of their blocks.
    """
    before = block.__dict__.get("forward")
    block.forward = forward
    undo.callback(_restore_forward, block, before)


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
    strict: bool = False,
) -> list[BlockCall]:
    """Run the model once with every block replaced by a recorder that passes its hidden states on unchanged.

    No block computes anything, so block weights may stay on the meta device; embeddings must be real.

    Args:
        model: in eval mode.
        inputs: what the model is called with, by argument, or the token ids alone; the first dimension is the batch's.
        adapter: default, the model's.
        end: of an encoder-decoder, what the last encoder block gave: then it is the decoder's blocks that are recorded.
        strict: also see whether the model leaves alone what goes from block to block, and calls no block again.

    Returns:
        One call a block, in order; the first carries the tensors it was given.

    Raises:
        ChainError: the blocks aren't called once each, in order, with hidden states first. ModelError: the model fails
            on these inputs, with its own error.
    """
    given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    adapter = adapter or adapter_for(model)
    if adapter.whole:
        return [_whole_call(given, data_kind(adapter.reads).real(given))]
    names = adapter.stack_names(model)[: 1 if end is None else 2]
    stacks = [[model.get_submodule(name) for name in stack] for stack in names]
    behind = _behind(model, adapter, len(stacks)) if strict else None
    problems: list[Exception] = []
    # Most blocks return a tensor, some a tuple that the model takes [0] of, or two or three things. Given a tensor, the
    # second kind of model drops the batch dimension, which the next recorder sees: so try a tensor first, then tuples.
    for width in tuple_widths(adapter.flows):
        try:
            calls, good = _record(model, stacks, given, end, adapter.flows, width, behind)
        except (ModelError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            problems.append(error)
            continue
        if good:
            samples, first = len(next(iter(given.values()))), calls[0].start
            if first is not None and len(first[HIDDEN]) != samples:
                raise ChainError(
                    f"{type(model).__name__} gives its blocks hidden states {list(first[HIDDEN].shape)}, which don't "
                    f"begin with the {samples} samples, so they can't be carried from block to block."
                )
            if adapter.convolutional:
                # The network reads its input as it is; a wrapper may have moved it to where its weights aren't yet.
                dtype = next(stacks[0][0].parameters()).dtype
                hidden = next(iter(given.values()))
                calls[0] = replace(calls[0], start={HIDDEN: hidden.to(dtype) if hidden.is_floating_point() else hidden})
            padded = given.get("decoder_attention_mask")
            real = data_kind(adapter.reads).real(given) if end is None else None if padded is None else padded.bool()
            return [replace(call, mask=real) for call in calls]
    fault = _fault(model, len(stacks[-1]), problems, len(tuple_widths(adapter.flows)))
    raise fault from (problems[0] if problems else None)


def _whole_call(given: Mapping[str, Tensor], real: Tensor | None) -> WholeCall:
    main, *others = given
    return WholeCall(
        index=0, args=(), kwargs={}, keyword=main, start={HIDDEN: given[main]}, mask=real,
        inputs={name: given[name] for name in others},
    )  # fmt: skip


def _fault(model: nn.Module, blocks: int, problems: Sequence[Exception], tries: int) -> ModelError:
    """What to say of a model that can't be recorded: its own error, where it fails whatever its blocks return."""
    name, said = type(model).__name__, [f"{type(p).__name__}: {p}" for p in problems]
    if len(said) == tries and len(set(said)) == 1:
        return ModelError(
            f"{name} fails before its blocks are reached: {said[0]}. Does it run on this input without quantization?"
        )
    why = f" ({said[0]})" if said else ""
    return ChainError(f"{name} doesn't call its {blocks} blocks one after the other on its hidden states{why}.")


def tuple_widths(flows: Sequence[Flow]) -> tuple[int, ...]:
    """How long a tuple a model's blocks may return, in the order to try; 0 for a bare tensor."""
    return (max(_place(flows), *(flow.gives for flow in flows)) + 1,) if flows else (0, 1, 2, 3)


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
