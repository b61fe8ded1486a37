"""What a run will need: memory, disk and seconds, from shapes alone; docs/memory.md compares it with runs.

The model's parts, hidden states and forwards are counted here; what each step takes it says itself (:class:`Cost`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.core.memory import KEPT
from nybble.nn.embedding import input_embedding
from nybble.nn.kinds import Target, kind_of
from nybble.walk.steps import BlockStep, Cost, Load, Subject

BASE = 300_000_000
"""Bytes for imported libraries, the tokenizer with its text, and the allocator's gaps."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will need: bytes of memory above the interpreter's, bytes of disk, and seconds (a rough guess).

    ``window``: bytes of the blocks that are worked on together, with what the steps hold of them. ``bits``: of each
    quantized weight in the file, scales and all; 0 where none is quantized. ``pass_seconds``: of one sample's forward
    through the whole model, its head too; 0 where nobody knows yet.
    """

    memory: int
    disk: int
    seconds: float
    window: int = 0
    bits: float = 0.0
    pass_seconds: float = 0.0


def estimate(subject: Subject, steps: Sequence[BlockStep], load: Load, flops: float) -> Estimate:
    """Bytes and seconds.

    Args:
        subject: the model, on any device, the meta device too, and the plan.
        steps: of the recipe.
        load: sizes; of a model of images with what its layers do to one (:func:`with_layers`).
        flops: multiply-adds x 2 a second of a product in ``load.dtype``.
    """
    model, adapter, plan = subject.model, subject.adapter, subject.plan
    size, samples = load.dtype.itemsize, load.samples * load.seq_len
    blocks = [sum(p.numel() for p in block.parameters()) for block in adapter.blocks_of(model)]
    outside = [p.numel() for n, p in model.named_parameters() if not adapter.inside(n)]
    values = load.samples * load.sample if load.sample else samples * _width(model) if samples else 0
    hidden = values * size * load.streams
    block = max(blocks) * (load.source_bytes + (size if load.source_bytes != size else 0))
    costs = [_block_cost(subject, steps, targets, load) for targets in plan.blocks]
    at_once = min(load.window, len(blocks))
    window = at_once * (block + max(cost.held for cost in costs))
    work = max(
        max(_seeing(model, targets, load) + cost.peak, cost.alone)
        for targets, cost in zip(plan.blocks, costs, strict=True)
    )
    # What the C library keeps of freed tensors, for the thread that runs forwards and for the one of backwards.
    kept_freed = 2 * KEPT if any(cost.learning for cost in costs) else 0
    costs_behind = [_block_cost(subject, steps, [t], load) for t in plan.outside]
    behind = max((max(cost.peak, cost.alone) for cost in costs_behind), default=0)
    reading = 2 * max(outside, default=0) * load.source_bytes
    reading = max(reading, *(step.outside_bytes(subject, load) for step in steps))
    own = getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0) or 0  # what each block reads alone
    held = (0 if load.spilled else hidden) + samples * len(blocks) * own * size * load.streams
    memory = BASE + kept_freed + sum(outside) * size + max(reading, held + max(window + work, behind))
    memory += sum(blocks) * load.source_bytes if load.whole else 0
    memory += sum(blocks) * size if load.kept else 0
    memory += _fisher(subject, steps, load, sum(blocks))
    targets = [t for block_targets in plan.blocks for t in block_targets]
    packed = sum(cost.stored for cost in (*costs, *costs_behind))
    quantized = sum(_elements(t) for t in (*targets, *plan.outside) if t.rule.weights)
    memory += 0 if load.source_bytes else packed  # beside the float weights, which are held until all is done
    rest = max(0, sum(blocks) + sum(outside) - quantized)
    # The parts and the final file exist together for a moment.
    disk = int(2 * (packed + rest * size)) + (hidden if load.spilled else 0)
    products = sum(load.samples * load.products.get(t.name, 0) * math.prod(t.shape) for t in targets)
    forward = products if load.sample else samples * sum(blocks)
    seconds = 3 + ((2 + load.streams - 1) * 2 * forward + sum(cost.flops for cost in costs)) / flops
    return Estimate(
        memory=int(memory),
        disk=disk,
        seconds=seconds,
        window=int(window + work),
        bits=8 * packed / quantized if quantized else 0.0,
        pass_seconds=2 * _whole_pass(subject, load, products, sum(blocks)) / flops,
    )


def _whole_pass(subject: Subject, load: Load, products: int, blocks: int) -> float:
    """Multiply-adds of one sample's forward through the whole model; ``products``: of all samples, of images."""
    if load.sample:
        return products / load.samples
    find: Any = getattr(subject.model, "get_output_embeddings", lambda: None)
    head = find()
    return load.taught_len * (blocks + (0 if head is None else sum(p.numel() for p in head.parameters())))


def _block_cost(subject: Subject, steps: Sequence[BlockStep], targets: Sequence[Target], load: Load) -> Cost:
    """Of all steps on one block: what they hold adds up, what they need while running or learning doesn't."""
    costs = [step.cost(subject, targets, load) for step in steps]
    return Cost(
        held=sum(cost.held for cost in costs) + max((cost.learning for cost in costs), default=0),
        peak=max((cost.peak for cost in costs), default=0),
        alone=max((cost.alone for cost in costs), default=0),
        flops=sum(cost.flops for cost in costs),
        stored=sum(cost.stored for cost in costs),
    )


def _fisher(subject: Subject, steps: Sequence[BlockStep], load: Load, weights: int) -> int:
    """The whole model, what its backward keeps, and the weights of all outputs."""
    tokens = max((step.gradient_tokens(subject, load) for step in steps), default=0)
    if not tokens:
        return 0
    rows = sum(t.shape[0] for targets in subject.plan.blocks for t in targets)
    size = load.dtype.itemsize
    return weights * size + 4 * tokens * rows + load.tokens * 8 * size * rows


def with_layers(
    model: Any, names: Mapping[str, str], example: Mapping[str, Tensor]
) -> tuple[dict[str, int], dict[str, int]]:
    """Of each layer, rows that its matrix is multiplied with and elements of its input, for one sample.

    Args:
        model: on any device; a copy of it runs on none.
        names: of layers in the model -> those that the answers have.
        example: inputs of one sample, on the meta device.
    """
    rows: dict[str, int] = {}
    inputs: dict[str, int] = {}
    twin = copy.deepcopy(model).to("meta")

    def note(name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            kind = kind_of(module)
            assert kind is not None
            rows[name], inputs[name] = kind.products(module, output), kind.reads(args, {}).numel()

        return hook

    for name, module in twin.named_modules():
        if name in names:
            module.register_forward_hook(note(names[name]))
    with torch.no_grad():
        dtype = next(twin.parameters()).dtype
        twin(**{name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in example.items()})
    return rows, inputs


def _seeing(model: Any, targets: Sequence[Target], load: Load) -> int:
    """Activations of one batch inside a block: about four tensors of each width, and the widest in float32 twice.

    Of a model of images: its largest layer's input, its columns and its output.
    """
    if not targets or not load.samples:
        return 0
    size, widest = load.dtype.itemsize, max(max(t.shape) for t in targets)
    if load.inputs:
        together = [load.products.get(t.name, 0) * t.shape[1] + 4 * load.inputs.get(t.name, 0) for t in targets]
        return 8 * load.batch * max(together, default=0)
    wide = 2 + (3 if any(t.rule.inputs for t in targets) else 0)
    casts = 4 * (load.tokens * 2 * widest + max(math.prod(t.shape) for t in targets)) if load.wide else 0
    bytes_ = casts + load.tokens * (4 * size * (_width(model) + widest) + 4 * wide * widest)
    config = model.config.get_text_config()
    if getattr(config, "_attn_implementation", None) == "eager":
        stated = getattr(config, "num_attention_heads", 1)
        heads = max(stated) if isinstance(stated, list | tuple) else stated
        bytes_ += load.tokens * load.seq_len * heads * (4 + 2 * size)
    return int(bytes_)


def _elements(target: Target) -> int:
    return math.prod(target.shape) * target.matrices


def _width(model: Any) -> int:
    stated = getattr(model.config.get_text_config(), "hidden_size", 0)
    table: Any = None if stated else input_embedding(model)
    if table is not None:
        return int(table.embedding_dim)
    return int(stated or max((p.shape[-1] for p in model.parameters() if p.ndim == 2), default=1))
