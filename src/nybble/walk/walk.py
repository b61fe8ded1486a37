"""The walk over the blocks: load one, see its inputs, solve its weights, write the part, move the hidden states on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from nybble.calibration.fisher import fisher_of, layers_with_weights
from nybble.calibration.statistics import SecondMoment
from nybble.calibration.streams import Activations
from nybble.calibration.trace import BlockCall, capture_block_calls
from nybble.calibration.watch import Known, see_block, see_nothing
from nybble.checkpoint.parts import SPILL, Parts
from nybble.core.errors import DataError
from nybble.core.memory import trim_memory
from nybble.core.progress import Progress, task
from nybble.core.seeds import derive_seed
from nybble.corrections.bias import correct_biases, large, output_means
from nybble.nn.kinds import Target
from nybble.nn.swap import hold_dense
from nybble.report.record import LayerRow
from nybble.transforms._apply import transform_block
from nybble.transforms._batchnorm import fold_norms
from nybble.walk.job import OUTSIDE, Job, part_name
from nybble.walk.products import put_products, solve_products
from nybble.walk.solve import check_finite, solve_block


@dataclass
class Walk:
    """One run on its way: a job, and the hidden states between its blocks.

    Attributes:
        job: what is to be done.
        stream: hidden states in front of the next block. calls: how its blocks are called, by the batch's first sample.
        fisher: weights of outputs, where the solver asks for them.
        known: what was gathered of the current block, where several walks share it (else it is let go of while the
            block is solved); one of them ``leads``: it moves the hidden states of all of them on, behind the last block
            too if it ``finishes``.
    """

    job: Job
    stream: Activations | None = None
    calls: dict[int, list[BlockCall]] = field(default_factory=dict)
    fisher: dict[str, Tensor] = field(default_factory=dict)
    known: Known | None = None
    leads: bool = True
    finishes: bool = False

    def __post_init__(self) -> None:
        self.names = self.job.adapter.block_names(self.job.model)
        self.stacks = [len(names) for names in self.job.adapter.stack_names(self.job.model)]
        self.finishes = any(target.head for target in self.job.plan.outside)

    def run(self, parts: Parts | None, progress: Progress) -> list[LayerRow]:
        """Quantize every block, then what is outside them; returns all rows."""
        self.begin(parts)
        rows: list[LayerRow] = []
        try:
            with task(progress, len(self.job.plan.blocks) + 1, f"quantize ({self.job.recipe.name})") as bar:
                for index in range(len(self.job.plan.blocks)):
                    rows += self.block(index, parts)
                    bar.advance(note=rows[-1].name if rows else "")
                rows += self.outside(parts)
                bar.advance(note="")
        finally:
            if self.stream is not None:
                self.stream.close()
        return rows

    def begin(self, parts: Parts | None) -> None:
        """What comes before the first block."""
        self._load_outside()
        if self.job.tokens is not None and self.leads:
            self._begin(self.job.tokens.inputs, parts)
        self._see_gradients()

    def _see_gradients(self) -> None:
        """Fisher weights, where the solver asks for them: a pass of the whole float model, which is let go of then."""
        job = self.job
        if job.tokens is None or "fisher" not in job.plan.needs(job.solver):
            return
        model = job.model if job.source is None else job.source.model(job.settings.dtype, job.device)
        layers = layers_with_weights(list(zip(self.names, job.plan.blocks, strict=True)))
        if not layers:
            raise DataError("loss=fisher weighs the outputs of linear layers, and none is quantized; use loss=output.")
        self.fisher = fisher_of(
            model, job.adapter, layers, job.tokens.inputs, batch=job.settings.batch, tokens=job.tokens.tokens,
            most=job.solver.most_tokens, seed=job.settings.seed,
        )  # fmt: skip

    def block(self, index: int, parts: Parts | None) -> list[LayerRow]:
        """Quantize one block; returns its rows."""
        name, prefix = part_name(index), self.names[index]
        block = self.job.model.get_submodule(prefix)
        last = index + 1 == len(self.job.plan.blocks)
        moves_on = self.leads and self.job.tokens is not None and (not last or self.finishes)
        if self.leads:
            self.enter(index, parts)
        if parts is not None and parts.done(name):
            rows = [LayerRow.from_dict(row) for row in parts.rows(name)]
            if moves_on:
                self._replay(block, index, parts)
        else:
            originals = self._load_block(block, prefix)
            rows = self._quantize_block(block, index, originals, moves_on)
            if parts is not None:
                parts.write(name, f"{prefix}.", block, [row.to_dict() for row in rows])
        if parts is not None:
            self._release(block)
        return rows

    def enter(self, index: int, parts: Parts | None) -> None:
        """Before the first block of a decoder: hidden states and calls of its own."""
        if self.job.tokens is not None and index == self.stacks[0]:
            self._begin(self.job.tokens.inputs, parts, decoder=True)

    def _quantize_block(
        self, block: nn.Module, index: int, originals: dict[str, Tensor], moves_on: bool
    ) -> list[LayerRow]:
        """See, solve and move the hidden states on: before the weights change on the float path, after it else."""
        prefix, targets = self.names[index], self.job.plan.blocks[index]
        seen = see_nothing(targets)
        if self.job.tokens is not None:
            self._seed(index, "see")
            batches = partial(self._batches, index)
            if self.job.transforms:
                config = self.job.model.config
                transform_block(block, self.job.transforms, self.job.adapter, config, originals, batches)
            folded = fold_norms(block, prefix, targets, originals, batches)
            seen = see_block(block, prefix, targets, self.job.solver, batches, self.job.tokens.tokens, self.known)
            seen.fisher.update(self.fisher)
            seen.folded.update(folded)
        products = self.job.plan.products[index]
        see = None if self.job.tokens is None else partial(self._batches, index)
        rows, parts = solve_products(block, f"{prefix}.", products, self.job.solver, see)
        if moves_on and self.job.solver.path == "float":
            self._advance(block, index)
        self._seed(index, "solve")
        convs = [target.name for target in targets if target.kind.channels_first]
        with self._unbiased(block, index, convs):
            rows += solve_block(block, f"{prefix}.", targets, self.job.solver, seen, originals)
        put_products(block, parts)
        if moves_on and self.job.solver.path == "quantized":
            self._advance(block, index)
        return rows

    @contextmanager
    def _unbiased(self, block: nn.Module, index: int, convs: list[str]) -> Iterator[None]:
        """Let the channels of a convolutional network keep their means while it is quantized."""
        if self.job.tokens is None or not convs or not self.job.adapter.convolutional:
            yield
            return
        batches = large(partial(self._batches, index))
        means = output_means(block, convs, batches)
        yield
        hold_dense(block, self.job.settings.dtype)
        correct_biases(block, convs, batches, means)
        hold_dense(block, None)

    def _replay(self, block: nn.Module, index: int, parts: Parts) -> None:
        """Move the hidden states through a block that an earlier run finished."""
        if self.job.solver.path == "quantized":
            parts.restore(part_name(index), self.job.model, self.job.device)
        else:
            self._load_block(block, self.names[index])
        self._advance(block, index)

    def _seed(self, index: int, phase: str) -> None:
        """Stochastic roundings draw from the global state: fix it, so that a resumed run draws the same."""
        torch.manual_seed(derive_seed(self.job.settings.seed, part_name(index), phase))

    def _advance(self, block: nn.Module, index: int) -> None:
        """Run the block on its stream; its outputs become the next block's inputs."""
        self._seed(index, "advance")
        assert self.stream is not None
        hold_dense(block, self.job.settings.dtype)
        start = 0
        for call, hidden in self._batches(index):
            output = call.run(block, hidden)
            self.stream.write(start, output)
            start += output.shape[0]
        hold_dense(block, None)
        if not self.stream.finite():
            raise DataError(f"the outputs of block {index} hold NaN or Inf; try another dtype or a gentler scheme.")

    def outside(self, parts: Parts | None) -> list[LayerRow]:
        """Quantize what is in no block."""
        if parts is not None and parts.done(OUTSIDE):
            return [LayerRow.from_dict(row) for row in parts.rows(OUTSIDE)]
        originals, outside = {}, self.job.plan.outside
        if self.job.source is not None and outside:
            originals = self.job.source.load([n for t in outside for n in t.parameters], device=self.job.device)
        rows = []
        for target in outside:
            self._seed(len(self.job.plan.blocks), target.name)
            seen = see_nothing([target])
            moment = self._head_moment(target) if target.head else None
            if moment is not None:
                seen.moments[target.name] = moment
            rows += solve_block(self.job.model, "", [target], self.job.solver, seen, originals)
        if parts is not None:
            parts.write(OUTSIDE, "", self.job.model, [row.to_dict() for row in rows], without=self.job.adapter.inside)
        return rows

    def _head_moment(self, target: Target) -> SecondMoment | None:
        """Of what the head of a shared table reads: the hidden states behind the last block, through the final norm."""
        if self.stream is None or "second_moment" not in self.job.solver.needs(None):
            return None
        path = self.job.adapter.final_norm
        norm = nn.Identity() if path is None else self.job.model.get_submodule(path)
        moment = SecondMoment(target.shape[1])
        for start in range(0, len(self.stream), self.job.settings.batch):
            moment.add(norm(self.stream.read(start, min(start + self.job.settings.batch, len(self.stream)))))
        return moment

    def _load_outside(self) -> None:
        if self.job.source is None:
            return
        names = [n for n in self.job.adapter.outside(self.job.model) if n in self.job.source.stored()]
        found = self.job.source.load(names, dtype=self.job.settings.dtype, device=self.job.device)
        _check_finite(found)
        self.job.model.load_state_dict(found, strict=False, assign=True)
        self.job.model.tie_weights()
        for buffer_name, buffer in self.job.model.named_buffers():
            if buffer.device != self.job.device and buffer.device.type != "meta":
                owner, _, leaf = buffer_name.rpartition(".")
                self.job.model.get_submodule(owner)._buffers[leaf] = buffer.to(self.job.device)

    def _load_block(self, block: nn.Module, prefix: str) -> dict[str, Tensor]:
        """Fill a block from the source; returns its parameters in the source's precision, names relative to it."""
        if self.job.source is None:
            return {}
        names = [f"{prefix}.{n}" for n, _ in block.named_parameters()] + [
            f"{prefix}.{n}" for n in block.state_dict() if f"{prefix}.{n}" in self.job.source.stored()
        ]
        names = list(dict.fromkeys(names))
        loaded = self.job.source.load(names, device=self.job.device)
        _check_finite(loaded)
        found = {n.removeprefix(f"{prefix}."): t for n, t in loaded.items()}
        cast = {n: t.to(self.job.settings.dtype) if t.is_floating_point() else t for n, t in found.items()}
        block.load_state_dict(cast, strict=False, assign=True)
        return found

    def _release(self, block: nn.Module) -> None:
        """Give the memory of a finished block back."""
        if self.job.source is not None:
            block.to("meta")
            trim_memory()

    def _begin(self, inputs: Mapping[str, Tensor], parts: Parts | None, decoder: bool = False) -> None:
        """Hidden states before the first block of a stack, and how its blocks are called in every batch.

        Batches of one size are called alike where nothing but token ids goes in.
        """
        before, self.stream = self.stream, None
        self.calls, alike = {}, set(inputs) == {"input_ids"} and not decoder
        samples = next(iter(inputs.values())).shape[0]
        first: dict[int, list[BlockCall]] = {}
        for start in range(0, samples, self.job.settings.batch):
            given = self.job.kind.batch(inputs, start, start + self.job.settings.batch, self.job.device).inputs
            size = next(iter(given.values())).shape[0]
            end = before.read(start, start + size) if decoder and before is not None else None
            calls = capture_block_calls(self.job.model, given, adapter=self.job.adapter, end=end)
            self.calls[start] = first.setdefault(size, calls) if alike else calls
            hidden = calls[0].hidden
            assert hidden is not None
            if self.stream is None:
                spill = parts.folder / f"{SPILL}{decoder:d}" if self.job.settings.spill and parts is not None else None
                self.stream = Activations((samples, *hidden.shape[1:]), hidden.dtype, self.job.device, spill)
            self.stream.write(start, hidden)
        if before is not None:
            before.close()

    def _batches(self, index: int) -> Iterator[tuple[BlockCall, Tensor]]:
        assert self.stream is not None
        within = index if index < self.stacks[0] else index - self.stacks[0]
        for start, calls in self.calls.items():
            yield calls[within], self.stream.read(start, min(start + self.job.settings.batch, len(self.stream)))


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
            check_finite(tensor, name)
