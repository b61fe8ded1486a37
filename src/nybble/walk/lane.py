"""One recipe on its way through a model: its blocks, its streams, and what becomes of each window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nybble.calibration.arguments import keeps
from nybble.calibration.block import BlockState
from nybble.calibration.fisher import block_gradients, fisher_of, guides_of, layers_with_weights
from nybble.calibration.spans import Span, spans
from nybble.calibration.streams import Stream
from nybble.calibration.tail import tail
from nybble.calibration.trace import HIDDEN, BlockCall, Tensors, capture_block_calls
from nybble.calibration.units import find_units
from nybble.calibration.window import Calibration, Known, Window
from nybble.checkpoint.parts import SPILL, Parts
from nybble.core import ranks
from nybble.core.errors import DataError
from nybble.core.seeds import derive_seed
from nybble.models.adapter import under
from nybble.nn.swap import hold_dense
from nybble.reconstruction import FISHER
from nybble.reconstruction.in_units import chains, in_units, layers_of
from nybble.reconstruction.twins import settle_twins
from nybble.report.record import LayerRow, block_rows, told
from nybble.walk.blocks import load_block, load_outside, outside_state, release
from nybble.walk.caches import cache_rows
from nybble.walk.carry import Carry
from nybble.walk.job import OUTSIDE, Job, part_name
from nybble.walk.steps.transform import TransformStep


class Lane:
    """The state of one run.

    Args:
        job: what is to be done.
        spill: a folder for hidden states that don't stay in memory; None keeps them there.

    Attributes:
        streams: by path, the tensors in front of the window. Lanes over the same float network may have one in common.
        states: the blocks that are loaded, by index.
    """

    def __init__(self, job: Job, spill: Path | None = None) -> None:
        self.job, self.spill = job, spill
        self.names = job.adapter.block_names(job.model)
        self.stacks = [len(names) for names in job.adapter.stack_names(job.model)]
        self.streams: dict[str, Stream] = {}
        self.states: dict[int, BlockState] = {}
        self.caches: dict[int, list[LayerRow]] = {}
        inputs = {} if job.tokens is None else job.tokens.inputs
        samples = len(next(iter(inputs.values()))) if inputs else 0
        self.calibration = Calibration(
            tokens=0 if job.tokens is None else job.tokens.tokens, samples=samples,
            batches=-(-samples // job.settings.batch), batch=job.settings.batch, device=job.device, dtype=job.dtype,
            seed=job.settings.seed, config=job.model.config, paths=job.paths, adapter=job.adapter, times=job.times,
            spill=self._spilled("wanted"),
        )  # fmt: skip

    def _spilled(self, name: str) -> Path | None:
        """Leading part of the names of this process's files, if hidden states are to be in files."""
        return None if self.spill is None else self.spill / f"{SPILL}{ranks.tag()}{name}"

    @property
    def calibrated(self) -> bool:
        """Whether anything looks at data."""
        return self.job.tokens is not None

    def spans(self) -> list[Span]:
        """Its windows."""
        return list(spans(self.stacks, self.job.window, self.job.overlap))

    # ------------------------------------------------------------------------------------------------ streams
    def begin(self) -> None:
        """Load what is in no block, and see what the first blocks are given."""
        load_outside(self.job)
        if self.calibrated:
            self.enter_stack(0)
            self._see_gradients()

    def begin_beside(self, lead: Lane) -> None:
        """The same for a lane that reads the lead's streams."""
        load_outside(self.job)
        self.streams = lead.streams
        self._see_gradients()

    def enter_stack(self, stack: int) -> None:
        """Streams in front of the first block of a stack; a decoder's reads what the encoder gave on each path."""
        assert self.job.tokens is not None
        before, self.streams = self.streams, {}
        first: Stream | None = None
        for path in sorted(self.job.paths):
            spill = self._spilled(f"{path}.{stack}")
            if first is not None and not stack:
                self.streams[path] = first.fork(spill)
                continue
            first = Stream(self.calibration.samples, self.job.device, spill)
            self._fill(first, before.get(path))
            self.streams[path] = first
        for stream in before.values():
            stream.close()

    def _fill(self, stream: Stream, encoder: Stream | None) -> None:
        """Run what is in front of a stack."""
        assert self.job.tokens is not None
        inputs, batch = self.job.tokens.inputs, self.job.settings.batch
        for start in range(0, self.calibration.samples, batch):
            given = self.job.kind.batch(inputs, start, start + batch, self.job.device).inputs
            end = None if encoder is None else encoder.read(start)[HIDDEN]
            calls = capture_block_calls(self.job.model, given, adapter=self.job.adapter, end=end)
            tensors = calls[0].start
            assert tensors is not None
            calls[0] = replace(calls[0], start=None)
            stream.begin(start, calls, tensors)

    def _see_gradients(self) -> None:
        """Fisher weights, where a step asks for them: passes of the whole float model, which is let go of then."""
        job = self.job
        if job.tokens is None or not job.needs & {"fisher", "guided", "output gradients"}:
            return
        model = job.model if job.source is None else job.source.model(job.dtype, job.device)
        if "output gradients" in job.needs:
            self._see_output_gradients(model)
        layers = layers_with_weights(list(zip(self.names, job.plan.blocks, strict=True)))
        if "guided" in job.needs:
            self.calibration.guides.update(
                guides_of(
                    model, job.adapter, layers, job.tokens.inputs, batch=job.settings.batch,
                    groups=job.solver.guides, seed=job.settings.seed,
                )
            )  # fmt: skip
        if "fisher" not in job.needs:
            return
        if not layers:
            raise DataError("loss=fisher weighs the outputs of linear layers, and none is quantized; use loss=output.")
        self.calibration.fisher.update(
            fisher_of(
                model, job.adapter, layers, job.tokens.inputs, batch=job.settings.batch, tokens=job.tokens.tokens,
                most=job.solver.most_tokens, seed=job.settings.seed,
            )
        )  # fmt: skip

    def _see_output_gradients(self, model: nn.Module) -> None:
        """Squares of the gradients by what every window gives, kept as hidden states are."""
        job, found = self.job, self.calibration.gradients
        assert job.tokens is not None
        last = self._outlets(model)
        for index, name in enumerate(last):
            found[name] = Stream(self.calibration.samples, job.device, self._spilled(f"gradient.{index}"))
        passes = block_gradients(
            model, job.adapter, last, job.tokens.inputs, batch=job.settings.batch, seed=job.settings.seed
        )
        for start, gradients in passes:
            size = min(job.settings.batch, self.calibration.samples - start)
            for name, gradient in gradients.items():
                wide = gradient.float() if gradient.dtype == torch.float16 else gradient  # squares need its exponents
                found[name].begin(start, (), {HIDDEN: wide.square()}, size)
        for stream in found.values():
            self._share(stream)

    def _share(self, stream: Stream) -> None:
        """Put what other processes have of their shares into a stream that has this one's."""
        first, samples, batch = self.calibration.first, self.calibration.samples, self.job.settings.batch
        made = ranks.others(
            self.calibration.batches, lambda number: stream.read(first(number))[HIDDEN], self.job.device
        )
        for number, tensor in made:
            stream.begin(first(number), (), {HIDDEN: tensor}, min(batch, samples - first(number)))

    def _outlets(self, model: nn.Module) -> list[str]:
        """Full names of the last block of every window; of those that are learned in units, the last of theirs."""
        job, found = self.job, dict[str, None]()
        assert job.tokens is not None
        inputs = job.kind.batch(job.tokens.inputs, 0, 2, next(model.parameters()).device).inputs
        for options in (step.reconstruction for step in job.reconstructions if FISHER in step.reconstruction.targets):
            units = in_units(job.adapter, options)
            for name, targets in zip(self.names, job.plan.blocks, strict=True) if units else ():
                block = model.get_submodule(name)
                own = find_units(
                    block, layers_of(targets, options), lambda: model(**inputs), inputs.values(), options.unit
                )
                windows = spans(chains(own), options.window, options.overlap)
                found |= {f"{under(name)}{own[span.stop - 1].name}": None for span in windows} or {name: None}
            found |= {} if units else {self.names[span.stop - 1]: None for span in self.spans()}
        return list(found)

    def close(self) -> None:
        """Let go of all streams."""
        for stream in (*self.streams.values(), *self.calibration.gradients.values()):
            stream.close()

    # ------------------------------------------------------------------------------------------------ windows
    def window(self, start: int, stop: int, part: str) -> Window:
        """Loaded blocks as a window."""

        def source(path: str, order: Sequence[int] | None) -> Iterator[tuple[Sequence[BlockCall], Tensors]]:
            stream = self.streams[path]
            begins = list(stream)
            for number in range(len(begins)) if order is None else order:
                at = begins[number]
                yield stream.calls[at][self._in_stack(start) :], stream.read(at)

        blocks = [self.states[index] for index in range(start, stop)]
        return Window(blocks, self.calibration, source if self.calibrated else None, part)

    def _in_stack(self, index: int) -> int:
        return index if index < self.stacks[0] else index - self.stacks[0]

    def work(self, span: Span, known: Known | None = None) -> None:
        """Bring the blocks that are new in a window into it, learn on all of it."""
        for index in range(span.start, span.stop):
            if index not in self.states:
                self._enter(index, span, known)
        if self.job.reconstructions:
            window = self.window(span.start, span.stop, f"window-{span.start:04d}")
            window.seed("learn")
            for step in self.job.reconstructions:
                step.run(window)

    def _enter(self, index: int, span: Span, known: Known | None) -> None:
        self.load(index)
        window = self.window(span.start, index + 1, "").only(index - span.start, part_name(index), known)
        window.seed("see")
        for step in self.job.entering:
            if step is self.job.solver_step and self.job.plan.cached:  # transforms change what is cached
                self.caches[index] = cache_rows(window, self.job.solver_step.path, self.job.plan.cached[index])
            step.run(window)
        if index + 1 < span.stop:
            hold_dense(self.states[index].module, self.job.dtype)  # the blocks behind it read what it gives, often

    def load(self, index: int) -> BlockState:
        """A float block."""
        plan = self.job.plan
        targets = [*plan.blocks[index], *plan.products[index]]
        state = self.states[index] = load_block(self.job, self.names[index], targets)
        return state

    def finish(self, span: Span) -> dict[int, list[LayerRow]]:
        """Settle and correct the blocks that leave; returns their rows."""
        found: dict[int, list[LayerRow]] = {}
        for index in range(span.start, span.leave):
            state = self.states[index]
            hold_dense(state.module, None)
            settle_twins(state)
            window = self.window(span.start, span.leave, "").only(index - span.start, part_name(index))
            window.seed("correct")
            for step in self.job.corrections:
                step.run(window)
            rows = [*block_rows(state), *self.caches.pop(index, ())]
            found[index] = rows if index else self._with_lessons(rows)
        return found

    def _with_lessons(self, rows: list[LayerRow]) -> list[LayerRow]:
        """The first block's rows, where the report finds what transforms learned of the whole network."""
        entries = [step.entry for step in self.job.transforms if isinstance(step, TransformStep) and step.entry]
        return [told(rows[0], entries), *rows[1:]] if entries and rows else rows

    def write(self, span: Span, rows: Mapping[int, Sequence[LayerRow]], parts: Parts) -> None:
        """Write the blocks that leave, and before them what those that stay bring along."""
        if span.leave < span.stop:
            Carry(parts, span.leave).write({i: self.states[i] for i in range(span.leave, span.stop)})
        window = f"window-{span.start:04d}"
        if window in self.job.times:
            parts.took(window, self.job.times[window])
        for index, found in rows.items():
            state = self.states[index]
            parts.write(part_name(index), state.prefix, state.module, [row.to_dict() for row in found])
        Carry(parts, span.start).remove()

    def advance(self, span: Span, finishes: bool) -> None:
        """Move the streams through the blocks that leave: on the float path as they were, on the other as they are."""
        if self.calibrated and (span.leave < len(self.names) or finishes):
            for index in range(span.start, span.leave):
                for path, stream in self.streams.items():
                    self._advance(index, path, stream)

    def _advance(self, index: int, path: str, stream: Stream) -> None:
        """Every process moves its share of the batches, and gives it to the others.

        Where blocks write into what later ones read (Gemma 4), all move all.
        """
        state, starts = self.states[index], list(stream)
        alone = any(keeps(stream.calls[start][self._in_stack(index)]) for start in starts)
        with state.on(path) as module, state.as_it_came() if path == "float" else nullcontext():
            hold_dense(module, self.job.dtype)
            for start in starts if alone else (starts[number] for number in ranks.share(len(starts))):
                torch.manual_seed(derive_seed(self.job.settings.seed, part_name(index), "advance", str(start)))
                stream.write(start, stream.calls[start][self._in_stack(index)].run(module, stream.read(start)))
            hold_dense(module, None)
        if not alone:
            for number, tensors in ranks.others(len(starts), lambda n: stream.read(starts[n]), self.job.device):
                stream.write(starts[number], tensors)
        if not stream.finite():
            raise DataError(f"the outputs of block {index} hold NaN or Inf; try another dtype or a gentler scheme.")

    def release(self, span: Span, written: bool) -> None:
        """Let go of the blocks that leave; of their weights too, where they are written."""
        for index in range(span.start, span.leave):
            state = self.states.pop(index)
            state.settle()
            if written and self.job.source is not None and not self.job.adapter.whole:
                release(state.module)

    # ------------------------------------------------------------------------------------------------ resuming
    def replay(self, span: Span, parts: Parts, finishes: bool, last: bool) -> list[LayerRow]:
        """Move the streams through blocks that an earlier run finished; returns their rows.

        Behind the ``last`` of these windows, blocks that the next one has too are brought back as they were.
        """
        moves = self.calibrated and (span.leave < len(self.names) or finishes)
        for index in range(span.start, span.leave) if moves else ():
            state = self.load(index) if "float" in self.streams else self._empty(index)
            if "float" in self.streams:
                window = self.window(index, index + 1, part_name(index))
                window.seed("see")
                for step in self.job.transforms:
                    step.run(window)
                self._advance(index, "float", self.streams["float"])
            if "quantized" in self.streams:
                parts.restore(part_name(index), self.job.model, self.job.device)
                self._advance(index, "quantized", self.streams["quantized"])
            self.states.pop(index)
            if self.job.source is not None:
                release(state.module)
        if last and span.leave < span.stop:
            carry = Carry(parts, span.leave)
            for index in range(span.leave, span.stop):
                self.load(index)
                carry.read(index, self.window(index, index + 1, ""), self.job)
        return [LayerRow.from_dict(row) for i in range(span.start, span.leave) for row in parts.rows(part_name(i))]

    def _empty(self, index: int) -> BlockState:
        state = self.states[index] = BlockState(self.job.model.get_submodule(self.names[index]), self.names[index])
        return state

    # ------------------------------------------------------------------------------------------------ the rest
    def outside(self, parts: Parts | None) -> list[LayerRow]:
        """Quantize what is in no block, on the inputs that it gets there."""
        if parts is not None and ranks.lead_says(parts.done(OUTSIDE)):
            return [LayerRow.from_dict(row) for row in parts.rows(OUTSIDE)]
        state = outside_state(self.job)
        source = None
        if self.job.outside_sees and self.calibrated:
            source = self._tail
        window = Window([state], self.calibration, source, part_name(len(self.names)))
        if state.targets:
            self.job.solver_step.run_outside(window)
        rows = block_rows(state)
        state.settle()
        if parts is not None:
            without = self.job.adapter.inside
            parts.write(OUTSIDE, "", self.job.model, [row.to_dict() for row in rows], without=without)
        return rows

    def _tail(self, path: str, order: Sequence[int] | None) -> Iterator[tuple[Sequence[BlockCall], Tensors]]:
        """The whole model's inputs with what the last block gave; blocks themselves are not run."""
        assert self.job.tokens is not None
        stream, batch = self.streams[path], self.job.settings.batch
        wanted, starts = self.job.outside_names(), list(stream)
        for start in starts if order is None else (starts[number] for number in order):
            batched = self.job.kind.batch(self.job.tokens.inputs, start, start + batch, self.job.device)
            yield [tail(self.job.adapter, batched.inputs, batched.real, wanted)], stream.read(start)
