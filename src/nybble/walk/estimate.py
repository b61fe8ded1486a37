"""What a run will need: memory, disk and seconds, from shapes alone; docs/memory.md compares it with runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nybble.corrections.bias import MOST
from nybble.models.adapter import Adapter
from nybble.nn.kinds import Target, kind_of
from nybble.report.portrait import SAMPLE
from nybble.solvers import Solver
from nybble.walk.plan import Plan

BASE = 300_000_000
"""Bytes for imported libraries, the tokenizer with its text, and the allocator's gaps."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """The sizes that decide the cost of a run.

    Attributes:
        samples, seq_len, batch: calibration; 0 samples if nothing is calibrated.
        dtype: of the forwards. source_bytes: bytes of a stored value; 0 for a model already in memory.
        whole: the source can only be read as a whole. kept: the result stays in memory. spilled: hidden states don't.
        example: one sample, by the model's argument, on the meta device; empty without calibration.
    """

    samples: int
    seq_len: int
    batch: int
    dtype: torch.dtype
    source_bytes: int
    whole: bool = False
    kept: bool = False
    spilled: bool = False
    example: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of one batch."""
        return min(self.batch, self.samples) * self.seq_len


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will need: bytes of memory above the interpreter's, bytes of disk, and seconds (a rough guess)."""

    memory: int
    disk: int
    seconds: float


def estimate(model: Any, adapter: Adapter, plan: Plan, solver: Solver, load: Load, flops: float) -> Estimate:
    """Bytes and seconds.

    Args:
        model: on any device, the meta device too.
        adapter: the model's.
        plan: what is quantized.
        solver: knows its own working memory.
        load: sizes.
        flops: multiply-adds x 2 a second of a product in ``load.dtype`` (:func:`measure_flops`).
    """
    if adapter.convolutional:
        return estimate_convs(model, plan, solver, load, flops)
    size = load.dtype.itemsize
    blocks = [sum(p.numel() for p in block.parameters()) for block in adapter.blocks_of(model)]
    outside = [p.numel() for n, p in model.named_parameters() if not adapter.inside(n)]
    hidden = load.samples * load.seq_len * _width(model) * size
    block = max(blocks) * (load.source_bytes + (size if load.source_bytes != size else 0))
    work = max(
        _seeing(model, targets, load)
        + _moments(targets, solver)
        + _inputs(targets, solver, load)
        + _solving(targets, solver)
        for targets in plan.blocks
    )
    reading = 2 * max(outside, default=0) * load.source_bytes
    behind = max((solver.working_bytes([t.shape[0]], t.shape[1]) for t in plan.outside), default=0)
    held = 0 if load.spilled else hidden
    memory = BASE + sum(outside) * size + max(reading, held + max(block + work, behind))
    memory += sum(blocks) * load.source_bytes if load.whole else 0
    memory += sum(blocks) * size if load.kept else 0
    if "fisher" in plan.needs(solver):  # the whole model, what its backward keeps, and the weights of all outputs
        tokens = min(load.samples * load.seq_len, solver.most_tokens)
        memory += sum(blocks) * size + 4 * tokens * sum(t.shape[0] for targets in plan.blocks for t in targets)
        memory += load.tokens * 8 * size * sum(t.shape[0] for targets in plan.blocks for t in targets)
    targets = [t for block_targets in plan.blocks for t in block_targets]
    packed = sum(_elements(t) * (t.rule.weights.format.bits + 1) / 8 for t in targets if t.rule.weights)
    rest = sum(blocks) + sum(outside) - sum(_elements(t) for t in targets)
    # The parts and the final file exist together for a moment.
    disk = int(2 * (packed + rest * size)) + (hidden if load.spilled else 0)
    passes = 2 * load.samples * load.seq_len
    seconds = 3 + passes * 2 * sum(blocks) / flops
    if plan.needs(solver) & {"second_moment", "inputs"}:
        seconds += sum(load.samples * load.seq_len * t.shape[1] ** 2 / flops + t.shape[1] * 1e-4 for t in targets)
    tokens = load.samples * load.seq_len
    searched = [solver.flops(*t.shape, tokens, t.rule.inputs) * t.matrices for t in targets if t.rule.weights]
    seconds += sum(searched) / flops
    return Estimate(memory=int(memory), disk=disk, seconds=seconds)


def estimate_convs(model: Any, plan: Plan, solver: Solver, load: Load, flops: float) -> Estimate:
    """As :func:`estimate` of a network that is one block, from what its layers do to one sample on the meta device."""
    size, targets = load.dtype.itemsize, plan.blocks[0]
    weights = sum(p.numel() for p in model.parameters())
    seen = _layer_sizes(model, {t.name for t in targets}, load.example) if load.example else {}
    most = min(load.samples * max((t.kind.rows_a_sample for t in targets), default=0), solver.most_tokens)
    gathered = plan.needs(solver) & {"second_moment", "inputs"}
    kept = sum(4 * t.shape[1] * (t.shape[1] + (most if "inputs" in gathered else SAMPLE)) for t in targets)
    together = [rows * t.shape[1] + 4 * inputs for t in targets for rows, inputs in [seen.get(t.name, (0, 0))]]
    working = [solver.working_bytes([t.shape[0]], t.shape[1]) + 24 * most * t.shape[1] for t in targets]
    sample = next((tensor.numel() for tensor in load.example.values()), 1)
    at_once = max(load.batch, min(load.samples, MOST // max(1, sample)))
    correcting = 4 * size * at_once * max((inputs for _, inputs in seen.values()), default=0)
    running = max(8 * load.batch * max(together, default=0), correcting)
    memory = BASE + weights * (size + 2 * load.source_bytes) + running
    memory += (kept if gathered else 0) + max(working, default=0)
    products = sum(rows * math.prod(t.shape) for t in targets for rows, _ in [seen.get(t.name, (0, 0))])
    seconds = 3 + 3 * load.samples * 2 * products / flops
    seconds += sum(solver.flops(*t.shape, most, t.rule.inputs) for t in targets if t.rule.weights) / flops
    packed = sum(_elements(t) * (t.rule.weights.format.bits + 1) / 8 for t in targets if t.rule.weights)
    rest = weights - sum(_elements(t) for t in targets)
    return Estimate(memory=int(memory), disk=int(2 * (packed + rest * size)), seconds=seconds)


def _layer_sizes(model: Any, names: set[str], example: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Of each layer, rows that its matrix is multiplied with and elements of its input, for one sample."""
    found: dict[str, tuple[int, int]] = {}
    twin = copy.deepcopy(model).to("meta")

    def note(name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            kind = kind_of(module)
            assert kind is not None
            found[name] = kind.products(module, output), kind.reads(args, {}).numel()

        return hook

    for name, module in twin.named_modules():
        short = next((n for n in names if name.endswith(f".{n}")), None)
        if short is not None:
            module.register_forward_hook(note(short))
    with torch.no_grad():
        dtype = next(twin.parameters()).dtype
        twin(**{name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in example.items()})
    return found


def _seeing(model: Any, targets: Sequence[Target], load: Load) -> int:
    """Activations of one batch inside a block: about four tensors of each width, and the widest in float32 twice."""
    if not targets or not load.samples:
        return 0
    size, widest = load.dtype.itemsize, max(max(t.shape) for t in targets)
    wide = 2 + (3 if any(t.rule.inputs for t in targets) else 0)
    bytes_ = load.tokens * (4 * size * (_width(model) + widest) + 4 * wide * widest)
    config = model.config.get_text_config()
    if getattr(config, "_attn_implementation", None) == "eager":
        heads = getattr(config, "num_attention_heads", 1)
        bytes_ += load.tokens * load.seq_len * heads * (4 + 2 * size)
    return int(bytes_)


def _moments(targets: Sequence[Target], solver: Solver) -> int:
    """Float32 second moments: a block reads at most three tensors of one width (qkv, out, MLP); and one to add."""
    needy = [t for t in targets if t.rule.weights is not None and "second_moment" in solver.needs(t.rule.inputs)]
    if not needy:
        return 0
    total = sum(4 * t.matrices * t.shape[1] ** 2 for t in needy if t.kind.fused)
    linear = [t.shape[1] for t in needy if not t.kind.fused]
    total += sum(4 * c * c * min(3, linear.count(c)) for c in set(linear))
    return int(total + 4 * max(t.shape[1] for t in needy) ** 2)


def _inputs(targets: Sequence[Target], solver: Solver, load: Load) -> int:
    """Inputs that a solver reads: kept in the model's dtype, three of a width; of the widest, six copies in float32."""
    needy = [t for t in targets if t.rule.weights is not None and "inputs" in solver.needs(t.rule.inputs)]
    if not needy:
        return 0
    tokens = min(load.samples * load.seq_len, solver.most_tokens)
    widths = [t.shape[1] for t in needy]
    kept = sum(c * min(3, widths.count(c)) for c in set(widths)) * load.dtype.itemsize
    return tokens * (kept + 24 * max(widths))


def _solving(targets: Sequence[Target], solver: Solver) -> int:
    """Of weights that are solved together, at most three of one width; experts are solved one by one."""
    found = [0]
    for width in {t.shape[1] for t in targets}:
        rows = sorted((t.shape[0] for t in targets if t.shape[1] == width and not t.kind.fused), reverse=True)[:3]
        rows = rows or [max(t.shape[0] for t in targets if t.shape[1] == width)]
        found.append(solver.working_bytes(rows, width))
    return max(found)


def _elements(target: Target) -> int:
    return math.prod(target.shape) * target.matrices


def _width(model: Any) -> int:
    stated = getattr(model.config.get_text_config(), "hidden_size", 0)
    return int(stated or model.get_input_embeddings().weight.shape[1])
