"""Seeing what a model does: the arguments each block is called with, and which weights read the same tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError
from nybble.core.memory import trim_much
from nybble.data.kinds import data_kind
from nybble.models.adapter import Adapter, Flow, adapter_for
from nybble.nn.kv_model import no_cache

HIDDEN = "hidden"
"""Name of the hidden states among the tensors that go from block to block."""
NAMED = "named "
"""In front of the names under which a block returned tensors, where it did."""
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
        skips: keyword -> name of a stream, of what an earlier block gave and this one gets past those between.
        kept: name of the stream in which a later block gets what this one gives; empty for none.
        ended: names of streams that no later block reads.
    """

    index: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    keyword: str | None
    start: Tensors | None
    mask: Tensor | None = None
    flows: tuple[Flow, ...] = ()
    skips: Mapping[str, str] = field(default_factory=dict)
    kept: str = ""
    ended: tuple[str, ...] = ()

    def run(self, block: nn.Module, given: Tensors) -> dict[str, Tensor]:
        """Call ``block`` as the model would, on these tensors; return those in front of the next block."""
        trim_much()
        named, args = dict(self.kwargs), list(self.args)
        for flow in self.flows:
            if flow.name in given and not (flow.once and self.index == 0):
                if isinstance(flow.takes, int):
                    args[flow.takes] = given[flow.name]
                else:
                    named[flow.takes] = given[flow.name]
        named |= {keyword: given[name] for keyword, name in self.skips.items()}
        hidden = given[HIDDEN]
        found = self._found(given, self._called(block, hidden, args, named))
        if self.kept:
            found[self.kept] = found[HIDDEN]
        return {name: tensor for name, tensor in found.items() if name not in self.ended}

    def _called(self, block: nn.Module, hidden: Tensor, args: list[Any], named: dict[str, Any]) -> Any:
        return (
            block(hidden, *args, **named) if self.keyword is None else block(*args, **{**named, self.keyword: hidden})
        )

    def _found(self, given: Tensors, output: Any) -> dict[str, Tensor]:
        """What stands in front of the next block."""
        if not isinstance(output, tuple | list):
            more = {f"{NAMED}{k}": v for k, v in output.items()} if isinstance(output, Mapping) else {}
            return {**given, HIDDEN: _main_output(output), **more}
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


@dataclass(frozen=True, kw_only=True)
class UnitCall(BlockCall):
    """A call of a module inside a block (:class:`nybble.calibration.units.Unit`).

    ``name``: its own, in the block. ``writes``: it writes to what it is given.
    """

    name: str
    writes: bool = False

    def run(self, block: nn.Module, given: Tensors) -> dict[str, Tensor]:
        """Call the module as it is in ``block`` now."""
        module, hidden = block.get_submodule(self.name), given[HIDDEN]
        return {HIDDEN: module(hidden.clone() if self.writes else hidden, *self.args, **self.kwargs)}


class NamedOutput(dict[str, Tensor]):
    """What a block returned by names, as the model reads it: by attribute (None of what there isn't) or by place."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int | slice) else super().__getitem__(key)


def returned_by_name(given: Tensors) -> NamedOutput | None:
    """The output of which :meth:`BlockCall.run` made these tensors; None where it had no names."""
    found = {name.removeprefix(NAMED): tensor for name, tensor in given.items() if name.startswith(NAMED)}
    return NamedOutput(found) if found else None


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
    gave: list[Any] = []
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
            calls.append(_with_skips(call, gave))
            shapes.add(hidden.shape)
            if behind is not None:
                if before and before[0].shape == hidden.shape and not _equal(before.pop(), hidden):
                    raise ChainError(f"{type(model).__name__} does more between its blocks than hand their outputs on.")
                before[:] = [hidden.clone()]
            if len(calls) == len(blocks) and behind is None:
                raise _AllSeenError
            values = {f.gives: call.args[f.takes] if isinstance(f.takes, int) else call.kwargs.get(f.takes)
                      for f in flows if not f.once}  # fmt: skip
            gave.append(hidden.view_as(hidden))  # its own object, so that it is known wherever the model takes it
            return returned(gave[-1], width, flows, values, _MORE if not flows and width > 1 else None)

        return forward

    def passed(*args: Any, **kwargs: Any) -> Any:
        return returned(end, width, flows, {})

    others = [(block, passed) for stack in stacks[:-1] for block in stack]
    try:
        _run_with(model, inputs, [*others, *((block, recorder(i)) for i, block in enumerate(blocks))], behind or ())
    except Exception as error:  # behind the last block is much that needs more than recorders give
        if isinstance(error, ChainError) or len(calls) < len(blocks):
            raise
    in_order = [call.index for call in calls] == list(range(len(blocks)))
    return _with_streams(calls), in_order and len(shapes) == 1


def _with_skips(call: BlockCall, gave: Sequence[Tensor]) -> BlockCall:
    """The call without keywords that hold what an earlier block gave, which come to it by streams.

    ``gave``: of the blocks so far, in order, as the very objects that the model was handed.
    """
    found = {
        keyword: f"skip of block {number}"
        for keyword, value in call.kwargs.items()
        for number, tensor in enumerate(gave)
        if value is tensor
    }
    kwargs = {keyword: value for keyword, value in call.kwargs.items() if keyword not in found}
    return replace(call, kwargs=kwargs, skips=found) if found else call


def _with_streams(calls: list[BlockCall]) -> list[BlockCall]:
    """The calls, with which of them begins and ends each stream."""
    last = {name: number for number, call in enumerate(calls) for name in call.skips.values()}
    return [
        replace(
            call,
            kept=name if (name := f"skip of block {call.index}") in last else "",
            ended=tuple(name for name, number in last.items() if number == at),
        )
        for at, call in enumerate(calls)
    ]


def _run_with(
    model: nn.Module, inputs: Mapping[str, Any], forwards: Sequence[tuple[nn.Module, Any]], last: Sequence[nn.Module]
) -> None:
    """Run a model with other forwards in some modules, at most until one of ``last`` is called."""

    def stop(*_: Any, **__: Any) -> Any:
        raise _AllSeenError

    with ExitStack() as undo:
        for module, forward in (*forwards, *((module, stop) for module in last)):
            replace_forward(module, forward, undo)
        with suppress(_AllSeenError):
            model(**inputs, **no_cache(model))


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
            calls[0] = replace(calls[0], start=_entering(model, adapter, stacks[0][0], given, calls[0].start))
            padded = given.get("decoder_attention_mask")
            real = data_kind(adapter.reads).real(given) if end is None else None if padded is None else padded.bool()
            return [replace(call, mask=real) for call in calls]
    fault = _fault(model, len(stacks[-1]), problems, len(tuple_widths(adapter.flows)))
    raise fault from (problems[0] if problems else None)


def _entering(
    model: nn.Module, adapter: Adapter, block: nn.Module, given: Mapping[str, Tensor], start: Tensors | None
) -> Tensors | None:
    """What goes into the first block, where it can be carried on.

    Raises:
        ChainError: hidden states without the samples in front.
    """
    samples = len(next(iter(given.values())))
    if start is not None and len(start[HIDDEN]) != samples:
        raise ChainError(
            f"{type(model).__name__} gives its blocks hidden states {list(start[HIDDEN].shape)}, which don't "
            f"begin with the {samples} samples, so they can't be carried from block to block."
        )
    if not adapter.convolutional:
        return start
    # The network reads its input as it is; a wrapper may have moved it to where its weights aren't yet.
    hidden, dtype = next(iter(given.values())), next(block.parameters()).dtype
    if start is not None and start[HIDDEN].shape != hidden.shape:  # but for what makes frames of it in front
        return start
    return {HIDDEN: hidden.to(dtype) if hidden.is_floating_point() else hidden}


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
