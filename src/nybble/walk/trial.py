"""One tiny forward of what was made, before it is called done; of parts on disk a block at a time."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from nybble.calibration.chain import chain_fault
from nybble.calibration.tail import tail
from nybble.calibration.trace import HIDDEN, Tensors, capture_block_calls
from nybble.checkpoint.parts import Parts
from nybble.core.errors import ModelError, NybbleError
from nybble.data import InMemory
from nybble.data.given import Data, samples_of
from nybble.nn.kv_model import no_cache
from nybble.walk.blocks import release
from nybble.walk.job import Job, part_name

SIZES = (64, 32, 28, 224)
"""Of pictures (and lengths of signals) that networks are made for, if they want one."""


def known_inputs(job: Job, data: Data) -> list[Tensors]:
    """What the model can be called with, before anything is quantized: a few tokens, one image; nothing if unknown.

    Where there are two, the second is longer, for a model that can't run on the first.

    It is a sample of the calibration. Without any, a kind of data can make one of most configs; else it is one of data
    that no step looks at, or a row or image as the first layer takes it, if the float network does run with it.
    """
    if job.tokens is not None:
        return [_placed(job, found) for found in job.kind.probes(job.tokens.inputs, job.device)]
    example = job.kind.example(job.model)
    if example is not None:
        return [_placed(job, found) for found in (example, *_samples(job, data))]
    for made in _guesses(job, data):
        given = _placed(job, made)
        if _runs(job, given):  # so that what fails later is the quantizing's fault
            return [given]
    return []


def _placed(job: Job, given: Tensors) -> Tensors:
    return {n: x.to(job.device, job.dtype if x.is_floating_point() else x.dtype) for n, x in given.items()}


def _guesses(job: Job, data: Data) -> Iterator[Tensors]:
    """A sample of data in memory; then what the first layer of a network could take, in usual sizes."""
    yield from _samples(job, data)
    main = job.model.main_input_name
    first = next((m for m in job.model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)), None)
    if first is None:
        return
    channels = first.in_features if isinstance(first, nn.Linear) else first.in_channels
    sides = 2 if isinstance(first, nn.Linear) else first.weight.dim() - 2
    shapes = [(channels, *(size,) * sides) for size in SIZES]
    for shape in [(channels,), *shapes] if isinstance(first, nn.Linear) else shapes:
        yield {main: torch.zeros(1, *shape, dtype=torch.float32)}


def _samples(job: Job, data: Data) -> list[Tensors]:
    """One of data in memory that no step asked for; nothing where it doesn't fit."""
    found: list[Tensors] = []
    if not isinstance(data, str | Path):
        with suppress(NybbleError):
            main = job.model.main_input_name
            samples = samples_of(data, job.kind, InMemory(job.model.config), job.settings.wanted(), main)
            found = [job.kind.batch(samples.inputs, 0, 1, job.device).inputs]
    return found


def _runs(job: Job, given: Tensors) -> bool:
    try:
        job.model(**given)
    except Exception:  # whatever a network raises of an input that isn't its own
        return False
    return True


def try_out(job: Job, given: Sequence[Tensors], parts: Parts | None = None) -> str:
    """Run the finished model once, or until it runs.

    Args:
        job: whose blocks are done.
        given: what it is called with, one after the other; nothing where nobody knows.
        parts: where they are written; None where the model is whole in memory.

    Returns:
        why it was not run, or not to its end, where nothing quantized is to blame; else empty.

    Raises:
        ModelError: something quantized fails; names it.
    """
    if not given:
        return (
            f"the quantized {job.name} was not tried out: nothing says what it is called with. Give data "
            "(one sample will do), or call it once."
        )
    for short in given[:-1]:
        with suppress(ModelError):
            if not _run(job, short, parts):
                return ""
    return _run(job, given[-1], parts)


def _run(job: Job, given: Tensors, parts: Parts | None) -> str:
    place = "the model"
    try:
        if parts is not None and (job.adapter.whole or _not_a_chain(job, given)):
            bring_back(job, parts)
            parts = None
        if parts is None:
            job.model(**given, **no_cache(job.model))
            return ""
        end: Tensors = {}
        for names in job.adapter.stack_names(job.model):
            place = f"the model in front of {names[0]}"
            calls = capture_block_calls(job.model, given, adapter=job.adapter, end=end.get(HIDDEN))
            tensors: Tensors | None = calls[0].start
            assert tensors is not None
            for place, call in zip(names, calls, strict=True):
                block = job.model.get_submodule(place)
                parts.fill(part_name(job.adapter.block_names(job.model).index(place)), job.model, block, job.device)
                tensors = call.run(block, tensors)
                release(block)
            end = tensors
        place = "the model behind its blocks"
        if job.plan.outside and end:
            _run_behind(job, given, end, parts)
    except Exception as error:
        said = f"{place} fails in a trial on a few inputs ({type(error).__name__}: {str(error)[:200]})"
        if _quantized(error):
            raise ModelError(f"{said}: what is quantized there can't be. Leave it in float (--ignore NAME).") from error
        return f"{said}, which nothing quantized is to blame for."
    return ""


def _run_behind(job: Job, given: Tensors, end: Tensors, parts: Parts) -> None:
    """What is behind the blocks; of heads that use their inputs' shape once more (a choice of several), all of it."""
    try:
        tail(job.adapter, given, None, ()).run(job.model, end)
    except ModelError:
        bring_back(job, parts)
        job.model(**given, **no_cache(job.model))


def _not_a_chain(job: Job, given: Tensors) -> bool:
    """Whether blocks can't be run one after the other; without data nobody has asked before."""
    return not job.adapter.convolutional and chain_fault(job.model, job.adapter, given) is not None


def bring_back(job: Job, parts: Parts) -> None:
    """Bring all blocks that were written back into the model."""
    for index, name in enumerate(job.adapter.block_names(job.model)):
        parts.fill(part_name(index), job.model, job.model.get_submodule(name), job.device)
    job.model.tie_weights()


def _quantized(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, comes out of a quantized layer or of a packed weight that somebody read."""
    while error is not None:
        frames = traceback.walk_tb(error.__traceback__)
        # not any "Packed": models print themselves in errors, too
        read = re.search(r"'Packed' object|\bnot Packed\b", str(error))
        if read or any(f.f_globals["__name__"].startswith("nybble.nn") for f, _ in frames):
            return True
        error = error.__cause__
    return False
