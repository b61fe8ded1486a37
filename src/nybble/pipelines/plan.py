"""Before anything runs: which modules a scheme takes, whether their shapes fit, and what it will cost."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from nybble.core.errors import DeviceError, GranularityError, SchemeError, within
from nybble.models.adapter import Adapter
from nybble.models.experts import expert_weights, find_experts
from nybble.nn.activation import check_static
from nybble.nn.swap import class_names, matrix_of
from nybble.scheme import Rule, Scheme
from nybble.solvers import Solver


@dataclass(frozen=True)
class Target:
    """A weight to be quantized: a linear module, or a fused parameter with a matrix for each expert.

    ``shape``: [out, in] of one matrix. ``experts``: how many, 0 for a linear module.
    """

    name: str
    rule: Rule
    shape: tuple[int, int]
    experts: int = 0


@dataclass(frozen=True)
class Plan:
    """What will be done.

    Attributes:
        blocks: for each block, its targets with names relative to the block. outside: targets in no block.
        counts: pattern -> modules. ignored: names that ``ignore`` took out.
        columns: widest input of a target.
    """

    blocks: tuple[tuple[Target, ...], ...]
    outside: tuple[Target, ...]
    counts: Mapping[str, int]
    ignored: tuple[str, ...]

    @property
    def targets(self) -> int:
        """How many weights."""
        return sum(len(block) for block in self.blocks) + len(self.outside)

    @property
    def experts(self) -> bool:
        """Whether any weight is a fused one of experts."""
        return any(t.experts for block in self.blocks for t in block)

    @property
    def needs_ranges(self) -> bool:
        """Whether any input has a static quantizer."""
        return any(t.rule.inputs is not None and t.rule.inputs.static for block in self.blocks for t in block)


def make_plan(model: nn.Module, adapter: Adapter, scheme: Scheme, solver: Solver) -> Plan:
    """Match the scheme and check every weight against its quantizers.

    Args:
        model: may be on the meta device.

    Raises:
        SchemeError: a pattern without a match; a tied head; a quantizer that the solver or a module can't take.
        GranularityError: columns that a group doesn't divide; names the layer and the sizes that fit.
    """
    shapes: dict[str, tuple[tuple[int, int], int]] = {}
    classes: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        matrix = matrix_of(module)
        if matrix is not None:
            shapes[name], classes[name] = ((matrix.shape[0], matrix.shape[1]), 0), class_names(module)
    for path, module in find_experts(model):
        for weight in expert_weights(module):
            full = f"{path}.{weight.name}"
            shapes[full] = ((weight.out_features, weight.in_features), weight.experts)
            classes[full] = (type(module).__name__, "Experts", "Linear")
    found = scheme.match(classes)
    targets = {n: Target(n, rule, *shapes[n]) for n, rule in found.rules.items()}
    tied = {n.removesuffix(".weight") for group in adapter.tied_groups(model) for n in group}
    for target in targets.values():
        with within(target.name):
            _check(target, solver)
            if target.name in tied:
                raise SchemeError("its weight is tied to the embeddings, which stay in float; add it to ignore.")
    count = len(adapter.blocks_of(model))
    prefixes = [f"{adapter.block_name(i)}." for i in range(count)]
    blocks = tuple(
        tuple(
            Target(t.name.removeprefix(p), t.rule, t.shape, t.experts) for t in targets.values() if t.name.startswith(p)
        )
        for p in prefixes
    )
    inside = f"{adapter.blocks}."
    outside = tuple(t for t in targets.values() if not t.name.startswith(inside))
    for target in outside:
        if target.rule.inputs is not None and target.rule.inputs.static:
            raise SchemeError(
                f"{target.name} is outside the blocks, where no static activations are calibrated; use a dynamic quantizer."
            )
    return Plan(blocks, outside, found.counts, found.ignored)


def _check(target: Target, solver: Solver) -> None:
    rule, (_, columns) = target.rule, target.shape
    if rule.weights is not None:
        solver.quantizer_for(rule.weights).granularity.check(target.shape)
        if rule.weights.static:
            raise SchemeError("'static' is for activations; weights always keep their own scales.")
        if not rule.weights.format.signed and not (rule.weights.scale.needs_integer or rule.weights.scale.has_offset):
            raise SchemeError(
                f"weights are signed and {rule.weights.format} is not; add symmetric=false or use a signed format."
            )
    for side, width in ((rule.inputs, columns), (rule.outputs, target.shape[0])):
        if side is None:
            continue
        if target.experts:
            raise SchemeError(
                "fused experts take quantized weights only, and this rule quantizes activations. Give them a rule of "
                "their own before it (targets: [Experts]), or leave them in float (--ignore Experts)."
            )
        check_static(side)
        try:
            side.granularity.check((1, 8, width))
        except GranularityError as error:
            raise GranularityError(f"activations: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will need: bytes of memory above the interpreter's, bytes of disk, and seconds (a rough guess)."""

    memory: int
    disk: int
    seconds: float


def estimate(
    model: nn.Module,
    adapter: Adapter,
    plan: Plan,
    solver: Solver,
    *,
    samples: int,
    seq_len: int,
    batch: int,
    streams: int,
    dtype: torch.dtype,
    spilled: bool,
    flops: float,
) -> Estimate:
    """Bytes and seconds from shapes alone; the formula is in docs/memory.md and is checked against real runs.

    Args:
        samples, seq_len, batch: calibration; 0 samples if nothing is calibrated. streams: hidden-state streams kept.
        spilled: whether those are in a file. flops: measured multiply-adds x 2 a second of a product in ``dtype``.
    """
    blocks = adapter.blocks_of(model)
    block_weights = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    outside = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(f"{adapter.blocks}."))
    targets = [t for block in plan.blocks for t in block]
    width = max((t.shape[1] for t in targets), default=0)
    largest = max((math.prod(t.shape) for t in targets), default=0)
    size = dtype.itemsize
    hidden = samples * seq_len * _hidden_width(model) * size * streams
    widest = max((max(t.shape) for t in targets), default=0)
    work = batch * seq_len * widest * 6 * max(size, 4) if samples else 0
    moments = 0
    if solver.needs_second_moment:
        per_block = [{t.shape[1] for t in block} for block in plan.blocks]
        moments = max((sum(4 * c * c for c in columns) * 2 for columns in per_block), default=0) + 3 * 4 * width * width
    # a block in the source's precision and in the model's, and one group of weights about 8 times over in float32
    memory = block_weights * (4 + size) + largest * 4 * 8 + outside * size + moments + work + (0 if spilled else hidden)
    packed = sum(
        math.prod(t.shape) * max(1, t.experts) * (t.rule.weights.format.bits + 1) / 8 for t in targets if t.rule.weights
    )
    rest = sum(p.numel() for p in model.parameters()) - sum(math.prod(t.shape) * max(1, t.experts) for t in targets)
    # block files and the final file exist together for a moment
    disk = int(2 * (packed + rest * size)) + (hidden if spilled else 0)
    passes = streams * 2 if samples else 0
    everything = sum(p.numel() for block in blocks for p in block.parameters())
    forward = passes * samples * seq_len * 2 * everything / flops
    columns = sum(t.shape[1] for t in targets) if solver.needs_second_moment else 0
    seconds = forward + samples * seq_len * sum(t.shape[1] ** 2 for t in targets) / max(flops, 1) + columns * 1e-4 + 3
    return Estimate(memory=int(memory), disk=disk, seconds=seconds)


def _hidden_width(model: nn.Module) -> int:
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config  # type: ignore[union-attr, operator]
    return int(getattr(text, "hidden_size", 0) or getattr(text, "n_embd", 0) or getattr(text, "d_model", 0))


def require_memory(needed: int, device: torch.device) -> None:
    """Refuse a run that can't fit; names both numbers."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = _available()
    if needed > free:
        raise DeviceError(
            f"about {needed / 1e9:.1f} GB are needed on {device} and {free / 1e9:.1f} GB are free. "
            "Use fewer samples or shorter ones (--samples, --seq-len), or keep activations on disk (--spill)."
        )


def _available() -> int:
    """Bytes of memory that can be had without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds x 2 a second of a square product, from a few milliseconds of it."""
    import time

    n = 1024 if device.type == "cpu" else 4096
    a = torch.ones(n, n, dtype=dtype, device=device)
    best = math.inf
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
