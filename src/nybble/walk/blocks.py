"""Bringing a model's parts into memory and letting go of them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from nybble.calibration.block import BlockState
from nybble.core.memory import trim_memory
from nybble.models.adapter import under
from nybble.models.build.skeleton import kept_float32, unsaved
from nybble.nn.kinds import Target
from nybble.transforms import Rewrite
from nybble.walk.job import Job
from nybble.walk.steps.solver import check_finite


def load_outside(job: Job) -> None:
    """Fill what is in no block from the source, bring computed buffers to the device; then let the steps rewrite it."""
    if job.source is not None:
        known = {*job.source.stored(), *job.source.ties()}
        names = [name for name in job.adapter.outside(job.model) if name in known]
        found = job.source.load(names, dtype=job.dtype, device=job.device, kept=kept_float32(job.model))
        _check_finite(found)
        job.model.load_state_dict(found, strict=False, assign=True)
        job.model.tie_weights()
        for buffer_name, buffer in job.model.named_buffers():
            if buffer.device != job.device and buffer.device.type != "meta":
                owner, _, leaf = buffer_name.rpartition(".")
                job.model.get_submodule(owner)._buffers[leaf] = buffer.to(job.device)
    for rewrite in _outside_rewrites(job):
        precise = {} if job.source is None else job.source.load(rewrite.weights, device=job.device)
        rewrite.apply(BlockState(job.model, "", precise))


def _outside_rewrites(job: Job) -> list[Rewrite]:
    return [found for step in job.transforms for found in step.outside(job.model, job.settings.seed)]


def load_block(job: Job, name: str, targets: Sequence[Target]) -> BlockState:
    """A block with real weights: from the source, or as it is in memory."""
    block = job.model.get_submodule(name)
    if job.source is None:
        return BlockState(block, name, None, targets)
    return BlockState(block, name, fill(job, block, name), targets)


def fill(job: Job, block: nn.Module, name: str) -> dict[str, Tensor]:
    """Fill a block from the source; returns its tensors in the source's precision, names relative to it."""
    assert job.source is not None
    prefix, stored, computed = under(name), job.source.stored(), unsaved(job.model)
    names = [f"{prefix}{n}" for n, _ in block.named_parameters() if f"{prefix}{n}" not in computed] + [
        f"{prefix}{n}" for n in block.state_dict() if f"{prefix}{n}" in stored
    ]
    loaded = job.source.load(list(dict.fromkeys(names)), device=job.device)
    _check_finite(loaded)
    found = {n.removeprefix(prefix): t for n, t in loaded.items()}
    put(job, block, name, found)
    return found


def put(job: Job, block: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Let the block called ``name`` have these tensors, floats cast to the job's dtype, or as the family keeps them."""
    kept, live = kept_float32(job.model), block.state_dict()
    dtypes = {n: live[n].dtype if f"{under(name)}{n}" in kept else job.dtype for n in tensors}
    cast = {n: t.to(dtypes[n]) if t.is_floating_point() else t for n, t in tensors.items()}
    block.load_state_dict(cast, strict=False, assign=True)
    if block is job.model:
        block.tie_weights()


def outside_state(job: Job) -> BlockState:
    """The model itself as a block whose targets are those that are in no block, with the source's precision."""
    outside = job.plan.outside
    if job.source is None or not outside:
        return BlockState(job.model, "", {}, outside)
    rewrites = _outside_rewrites(job)  # the source has them as they were
    names = [name for target in outside for name in target.parameters]
    names += [name for rewrite in rewrites for name in rewrite.weights]
    state = BlockState(job.model, "", job.source.load(list(dict.fromkeys(names)), device=job.device), outside)
    for rewrite in rewrites:
        rewrite.apply(state)
    return state


def release(block: nn.Module) -> None:
    """Give the memory of a finished block back; what it computes itself and no file has stays."""
    computed = [(m, n, m._buffers[n]) for m in block.modules() for n in m._non_persistent_buffers_set]
    block.to("meta")
    for module, name, buffer in computed:
        module._buffers[name] = buffer
    trim_memory()


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        limit = tensor.numel() == 1 and bool(tensor.isinf())  # of what a layer lets through (Gemma 4's audio)
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not limit:
            check_finite(tensor, name)
