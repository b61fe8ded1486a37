"""The main job: a float model becomes a quantized one, block after block.

    1. open the source; a skeleton of the model without weights
    2. match the scheme, check shapes, estimate memory, disk and time; refuse what can't fit
    3. calibration tokens -> hidden states before block 0 (if any step needs to see activations)
    4. for each block: load it, see its inputs, solve its weights, write the part, move the hidden states on
    5. what is outside the blocks; then one file, config, manifest; the folder appears

The hidden states follow the path that the solver asks for: ``float`` (what the float network computes) or ``quantized``
(what it computes with the blocks so far quantized). Memory holds one block and its activations. A killed run is resumed
at the first block that isn't done; finished blocks are only run again to move the hidden states on, on the quantized
path from the stored codes, so the bytes are the same.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import nybble
from nybble.core.device import check_device, out_of_memory
from nybble.core.errors import DataError, FileError, NybbleError, SchemeError, UsageError, within
from nybble.core.files import AtomicFolder, need_space
from nybble.core.memory import trim_memory
from nybble.core.progress import Progress, Silent, task
from nybble.core.seeds import derive_seed, preserve_global_rng
from nybble.data import TokenSamples, load_text, token_samples
from nybble.models.adapter import Adapter, adapter_for
from nybble.models.source import open_source
from nybble.models.trace import BlockCall, capture_block_calls
from nybble.nn.swap import hold_dense, use_eager_experts
from nybble.pipelines.activations import Activations
from nybble.pipelines.block import check_finite, solve_block
from nybble.pipelines.checkpoint import SPILL, Parts, mark_quantized, model_config, save_side_files
from nybble.pipelines.estimate import Estimate, Load, estimate, measure_flops, require_memory
from nybble.pipelines.plan import Plan, make_plan
from nybble.pipelines.report import LayerRow, Report
from nybble.pipelines.watch import see_block, see_nothing
from nybble.recipe import Recipe, load_recipe
from nybble.solvers import Solver, make_solver

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nybble.models.source import ModelSource

DEFAULT_SAMPLES = 128
_OUTSIDE = "outside"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run can be told beside model, recipe and data.

    Attributes:
        samples: calibration sequences; None takes 128, or as many as the data has. seq_len: their length.
        batch: sequences a forward takes.
        seed: of every random choice. device: ``cpu`` or ``cuda``. dtype: of forwards and of what stays unquantized.
        resume: continue a killed run. spill: keep hidden states in a file instead of memory.
    """

    samples: int | None = None
    seq_len: int = 512
    batch: int = 8
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    resume: bool = False
    spill: bool = False

    def __post_init__(self) -> None:
        for name in ("samples", "seq_len", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be 1 or more.")
        check_device(self.device)


def quantize(
    model: str | Path | nn.Module,
    recipe: str | Recipe,
    data: str | TokenSamples = "builtin",
    *,
    out: str | Path | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> tuple[nn.Module | Path, Report]:
    """Quantize a model.

    Args:
        model: what :func:`nybble.models.open_source` takes, or a transformers model in memory (changed in place).
        recipe: a name, a YAML file, or a Recipe.
        data: a SRC, or tokens already cut.
        out: a folder to write; it appears whole or not at all. None keeps the result in memory.
        settings: sizes, device, seed.
        progress: told after each block.
        announce: gets the pre-flight lines.

    Returns:
        The quantized model, or with ``out`` its folder; and what was done.

    Raises:
        NybbleError: bad requests, files, data. Nothing is left behind, but for OUT.partial of a run that was killed,
            interrupted or stopped by a full disk: ``resume`` goes on from it.
    """
    settings = settings or Settings()
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    started = time.perf_counter()
    if out is not None and os.path.lexists(out):
        raise FileError(f"{out} exists already. Remove it or choose another output folder.")
    with preserve_global_rng(), torch.no_grad(), out_of_memory(settings.device):
        if isinstance(model, str | Path):
            source = open_source(str(model))
            job = Job.make(source.skeleton(settings.dtype), source, recipe, data, settings, kept=out is None)
        else:
            if out is not None:
                raise UsageError("a model in memory is quantized in memory; save it with nybble.save(model, folder).")
            job = Job.make(model, None, recipe, data, settings)
        for line in job.preflight(out):
            (announce or _ignore)(line)
        if out is None:
            rows = job.run(None, progress or Silent())
            mark_quantized(job.model)
            return job.model, Report(layers=tuple(rows), manifest=job.manifest(), seconds=time.perf_counter() - started)
        rows = _write(job, Path(out), progress or Silent(), announce or _ignore)
    return Path(out), Report(layers=tuple(rows), manifest=job.manifest(), seconds=time.perf_counter() - started)


def _write(job: Job, out: Path, progress: Progress, announce: Callable[[str], None]) -> list[LayerRow]:
    folder = AtomicFolder(out, resumable=True)
    try:
        with folder as partial:
            parts = Parts(partial, job.request(), job.settings.resume)
            if job.settings.resume:
                announce(parts.begun(job.part_names()))
            if not parts.assembled:
                job.run(parts, progress)
            if not parts.assembled:
                assert job.source is not None
                save_side_files(job.source, job.model, partial)
                parts.assemble(job.part_names(), model_config(job.model, job.settings.dtype), job.manifest())
            return parts.finish()
    except NybbleError as error:
        # A bad request leaves nothing; what could go on once there is room (a full disk) or the same request stays.
        if not isinstance(error, FileError):
            shutil.rmtree(folder.partial, ignore_errors=True)
        raise


@dataclass
class Job:
    """One run: the model, what is to be done to it, and the hidden states on their way through it."""

    model: Any
    adapter: Adapter  # found before any layer is quantized: looking at the model finds float layers only
    source: ModelSource | None
    recipe: Recipe
    solver: Solver
    plan: Plan
    settings: Settings
    tokens: TokenSamples | None
    estimate: Estimate
    streams: dict[str, Activations] = field(default_factory=dict)
    calls: dict[int, list[BlockCall]] = field(default_factory=dict)

    @staticmethod
    def make(
        model: PreTrainedModel | nn.Module,
        source: ModelSource | None,
        recipe: Recipe,
        data: str | TokenSamples,
        settings: Settings,
        kept: bool = True,
    ) -> Job:
        """Check the request against the model; nothing heavy runs. ``kept``: the result stays in memory."""
        if len(recipe.steps) != 1:
            raise SchemeError(f"recipe {recipe.name!r} has {len(recipe.steps)} solvers; a weight can be solved once.")
        solver = make_solver(recipe.steps[0].name, recipe.steps[0].options)
        adapter = adapter_for(model)
        with within(f"recipe {recipe.name}"):
            plan = make_plan(model, adapter, recipe.scheme, solver)
        if plan.experts:
            use_eager_experts(model)
        tokens = None
        if solver.needs_second_moment or plan.needs_ranges:
            tokens = data if isinstance(data, TokenSamples) else _calibration(source, data, settings)
            check_tokens(tokens, model)
        flops = measure_flops(torch.device(settings.device), settings.dtype)
        load = _load(source, settings, tokens, kept)
        cost = estimate(model, adapter, plan, solver, load, flops)
        return Job(model, adapter, source, recipe, solver, plan, settings, tokens, cost)

    @property
    def device(self) -> torch.device:
        """Where blocks run; a model in memory stays where it is."""
        if self.source is None:
            found: torch.device = next(iter(self.model.parameters())).device
            return found
        return torch.device(self.settings.device)

    def part_names(self) -> list[str]:
        """Names of all parts, in order."""
        return [_part(i) for i in range(len(self.plan.blocks))] + [_OUTSIDE]

    def preflight(self, out: str | Path | None) -> list[str]:
        """What will be done, in lines; raises if memory or disk can't hold it."""
        counts = ", ".join(f"{pattern}: {count}" for pattern, count in self.plan.counts.items())
        data = "no calibration"
        if self.tokens is not None:
            data = "calibration {} x {} tokens".format(*self.tokens.input_ids.shape)
            if self.settings.samples is None and self.tokens.available < DEFAULT_SAMPLES:
                data += f" (all that {self.tokens.source} has)"
        lines = [
            f"{self.plan.targets} weights in {len(self.plan.blocks)} blocks ({counts}); {data}",
            f"about {self.estimate.memory / 1e9:.2f} GB of memory, {self.estimate.disk / 1e9:.2f} GB of disk, "
            f"{self.estimate.seconds:.0f} s on {self.settings.device}",
        ]
        if self.source is not None and self.source.note:
            lines.append(self.source.note)
        require_memory(self.estimate.memory, self.device)
        if out is not None:
            need_space(out, self.estimate.disk)
        return lines

    def request(self) -> dict[str, Any]:
        """Everything that decides the bytes of the result."""
        return {
            "format_version": 1,
            "model": "" if self.source is None else self.source.fingerprint(),
            "recipe": self.recipe.to_dict(),
            "data": None if self.tokens is None else self.tokens.manifest(),
            "settings": {
                "seed": self.settings.seed,
                "batch": self.settings.batch,
                "device": self.settings.device,
                "dtype": str(self.settings.dtype),
            },
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }

    def manifest(self) -> dict[str, Any]:
        """What a file says of its origin: :meth:`request`, without what differs between machines."""
        known = self.request()
        known.pop("threads")
        return known

    # ------------------------------------------------------------------------------------------------ the walk
    def run(self, parts: Parts | None, progress: Progress) -> list[LayerRow]:
        """Quantize every block, then what is outside them; returns all rows."""
        self._load_outside()
        if self.tokens is not None:
            self._begin(self.tokens.input_ids, parts)
        rows: list[LayerRow] = []
        try:
            with task(progress, len(self.plan.blocks) + 1, f"quantize ({self.recipe.name})") as bar:
                for index in range(len(self.plan.blocks)):
                    rows += self._block(index, parts)
                    bar.advance(note=rows[-1].name if rows else "")
                rows += self._outside(parts)
                bar.advance(note="")
        finally:
            for stream in self.streams.values():
                stream.close()
        return rows

    def _block(self, index: int, parts: Parts | None) -> list[LayerRow]:
        name, prefix = _part(index), self.adapter.block_name(index)
        block = self.adapter.blocks_of(self.model)[index]
        moves_on = self.tokens is not None and index + 1 < len(self.plan.blocks)
        if parts is not None and parts.done(name):
            rows = parts.rows(name)
            if moves_on:
                self._replay(block, index, parts)
        else:
            originals = self._load_block(block, prefix)
            rows = self._quantize_block(block, index, originals, moves_on)
            if parts is not None:
                parts.write(name, f"{prefix}.", block, rows)
        if parts is not None:
            self._release(block)
        return rows

    def _quantize_block(
        self, block: nn.Module, index: int, originals: dict[str, Tensor], moves_on: bool
    ) -> list[LayerRow]:
        """See, solve and move the hidden states on: before the weights change on the float path, after it else."""
        prefix, targets = self.adapter.block_name(index), self.plan.blocks[index]
        seen = see_nothing(targets)
        if self.tokens is not None:
            self._seed(index, "see")
            stream = self.streams[self.solver.path]
            batches = partial(self._batches, stream, index)
            seen = see_block(block, prefix, targets, self.solver, batches, self.tokens.tokens)
        if moves_on and self.solver.path == "float":
            self._advance(block, index)
        self._seed(index, "solve")
        rows = solve_block(block, f"{prefix}.", targets, self.solver, seen, originals)
        if moves_on and self.solver.path == "quantized":
            self._advance(block, index)
        return rows

    def _replay(self, block: nn.Module, index: int, parts: Parts) -> None:
        """Move the hidden states through a block that an earlier run finished."""
        if self.solver.path == "quantized":
            parts.restore(_part(index), self.model, self.device)
        else:
            self._load_block(block, self.adapter.block_name(index))
        self._advance(block, index)

    def _seed(self, index: int, phase: str) -> None:
        """Stochastic roundings draw from the global state: fix it, so that a resumed run draws the same."""
        torch.manual_seed(derive_seed(self.settings.seed, _part(index), phase))

    def _advance(self, block: nn.Module, index: int) -> None:
        """Run the block on its stream; its outputs become the next block's inputs."""
        self._seed(index, "advance")
        stream = self.streams[self.solver.path]
        hold_dense(block, self.settings.dtype)
        start = 0
        for call, hidden in self._batches(stream, index):
            output = call.run(block, hidden)
            stream.write(start, output)
            start += output.shape[0]
        hold_dense(block, None)
        if not stream.finite():
            raise DataError(f"the outputs of block {index} hold NaN or Inf; try another dtype or a gentler scheme.")

    def _outside(self, parts: Parts | None) -> list[LayerRow]:
        if parts is not None and parts.done(_OUTSIDE):
            return parts.rows(_OUTSIDE)
        originals = {}
        if self.source is not None and self.plan.outside:
            originals = self.source.load([f"{t.name}.weight" for t in self.plan.outside], device=self.device)
        rows = []
        for target in self.plan.outside:
            self._seed(len(self.plan.blocks), target.name)
            rows += solve_block(self.model, "", [target], self.solver, see_nothing([target]), originals)
        if parts is not None:
            parts.write(_OUTSIDE, "", self.model, rows, without=f"{self.adapter.blocks}.")
        return rows

    # ------------------------------------------------------------------------------------- weights and streams
    def _load_outside(self) -> None:
        if self.source is None:
            return
        names = [n for n in self.adapter.outside(self.model) if n in self.source.stored()]
        found = self.source.load(names, dtype=self.settings.dtype, device=self.device)
        _check_finite(found)
        self.model.load_state_dict(found, strict=False, assign=True)
        self.model.tie_weights()
        for buffer_name, buffer in self.model.named_buffers():
            if buffer.device != self.device and buffer.device.type != "meta":
                owner, _, leaf = buffer_name.rpartition(".")
                self.model.get_submodule(owner)._buffers[leaf] = buffer.to(self.device)

    def _load_block(self, block: nn.Module, prefix: str) -> dict[str, Tensor]:
        """Fill a block from the source; returns its parameters in the source's precision, names relative to it."""
        if self.source is None:
            return {}
        names = [f"{prefix}.{n}" for n, _ in block.named_parameters()] + [
            f"{prefix}.{n}" for n in block.state_dict() if f"{prefix}.{n}" in self.source.stored()
        ]
        names = list(dict.fromkeys(names))
        loaded = self.source.load(names, device=self.device)
        _check_finite(loaded)
        found = {n.removeprefix(f"{prefix}."): t for n, t in loaded.items()}
        cast = {n: t.to(self.settings.dtype) if t.is_floating_point() else t for n, t in found.items()}
        block.load_state_dict(cast, strict=False, assign=True)
        return found

    def _release(self, block: nn.Module) -> None:
        """Give the memory of a finished block back."""
        if self.source is not None:
            block.to("meta")
            trim_memory()

    def _begin(self, input_ids: Tensor, parts: Parts | None) -> None:
        """Hidden states before block 0, and how every block is called, for each size of batch."""
        width = 0
        for start in range(0, input_ids.shape[0], self.settings.batch):
            ids = input_ids[start : start + self.settings.batch].to(self.device)
            calls = self.calls.get(ids.shape[0])
            if calls is None or start:
                calls = capture_block_calls(self.model, ids, adapter=self.adapter)
                self.calls.setdefault(ids.shape[0], calls)
            hidden = calls[0].hidden
            assert hidden is not None
            if not self.streams:
                width = hidden.shape[-1]
                spill = parts.folder / SPILL if self.settings.spill and parts is not None else None
                shape = (*input_ids.shape, width)
                self.streams[self.solver.path] = Activations(shape, hidden.dtype, self.device, spill)
            self.streams[self.solver.path].write(start, hidden)

    def _batches(self, stream: Activations, index: int) -> Iterator[tuple[BlockCall, Tensor]]:
        for start in range(0, len(stream), self.settings.batch):
            hidden = stream.read(start, min(start + self.settings.batch, len(stream)))
            yield self.calls[hidden.shape[0]][index], hidden


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
            check_finite(tensor, name)


def _load(source: ModelSource | None, settings: Settings, tokens: TokenSamples | None, kept: bool) -> Load:
    samples, seq_len = (0, 0) if tokens is None else tokens.input_ids.shape
    return Load(
        samples=samples,
        seq_len=seq_len,
        batch=settings.batch,
        dtype=settings.dtype,
        source_bytes=0 if source is None else max(t.dtype.itemsize for t in source.stored().values()),
        whole=source is not None and not source.streamable,
        kept=kept and source is not None,
        spilled=settings.spill and not kept,
    )


def _calibration(source: ModelSource | None, data: str, settings: Settings) -> TokenSamples:
    """Sequences of the data that a SRC names."""
    if source is None:
        raise UsageError(
            "a model in memory has no tokenizer here; pass data as TokenSamples (nybble.data.token_samples)."
        )
    tokenizer = source.tokenizer()
    text = load_text(data, "calibration", tokenizer)
    wanted, few = settings.samples or DEFAULT_SAMPLES, settings.samples is None
    return token_samples(text, tokenizer, samples=wanted, seq_len=settings.seq_len, seed=settings.seed, fewer=few)


def check_tokens(tokens: TokenSamples, model: Any) -> None:
    """Refuse what the model can't take: positions it doesn't have, tokens outside its embeddings."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    length, largest = tokens.input_ids.shape[1], int(tokens.input_ids.max())
    if positions is not None and length > positions:
        raise DataError(
            f"sequences of {length} tokens, and the model takes {positions}; give a --seq-len of at most that."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise DataError(
            f"the data has token {largest}, and the model's embeddings have {rows} rows; is it its tokenizer?"
        )


def _part(index: int) -> str:
    return f"block-{index:04d}"


def _ignore(line: str) -> None:
    return None


def versions() -> dict[str, str]:
    """Versions that may change a number."""
    import transformers

    return {
        "nybble": nybble.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


__all__ = ["Job", "Settings", "quantize", "versions"]
