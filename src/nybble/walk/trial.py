"""One tiny forward of what was made, before it is called done; of parts on disk a block at a time."""

from __future__ import annotations

import traceback

from torch import Tensor

from nybble.calibration.tail import tail
from nybble.calibration.trace import HIDDEN, Tensors, capture_block_calls
from nybble.checkpoint.parts import Parts
from nybble.core.errors import ModelError
from nybble.walk.blocks import release
from nybble.walk.job import Job, part_name


def try_out(job: Job, parts: Parts | None = None) -> str:
    """Run the finished model once on a few tokens, or one image.

    Args:
        job: whose blocks are done.
        parts: where they are written; None where the model is whole in memory.

    Returns:
        why it could not be run to its end, where nothing quantized is to blame; else empty.

    Raises:
        ModelError: something quantized fails; names it.
    """
    place = "the model"
    try:
        given = _inputs(job)
        if not given:
            return ""
        if parts is None:
            job.model(**given, **({"use_cache": False} if "input_ids" in given else {}))
            return ""
        end: Tensor | None = None
        for names in job.adapter.stack_names(job.model):
            place = f"the model in front of {names[0]}"
            calls = capture_block_calls(job.model, given, adapter=job.adapter, end=end)
            tensors: Tensors | None = calls[0].start
            assert tensors is not None
            for place, call in zip(names, calls, strict=True):
                block = job.model.get_submodule(place)
                parts.fill(part_name(job.adapter.block_names(job.model).index(place)), job.model, block, job.device)
                tensors = call.run(block, tensors)
                release(block)
            end = tensors[HIDDEN]
        place = "the model behind its blocks"
        if job.plan.outside and end is not None:
            tail(job.adapter, given, None, ()).run(job.model, {HIDDEN: end})
    except Exception as error:
        said = f"{place} fails in a trial on a few inputs ({type(error).__name__}: {str(error)[:200]})"
        if _quantized(error):
            raise ModelError(f"{said}: what is quantized there can't be. Leave it in float (--ignore NAME).") from error
        return f"{said}, which nothing quantized is to blame for."
    return ""


def _inputs(job: Job) -> dict[str, Tensor]:
    """What the model can be called with; nothing where its kind of data can't say."""
    made = job.kind.example(job.model)
    if made is None and job.tokens is not None:
        made = job.kind.probe(job.tokens.inputs, job.device)
    found = made or {}
    return {n: x.to(job.device, job.dtype if x.is_floating_point() else x.dtype) for n, x in found.items()}


def _quantized(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, comes out of a quantized layer or of a packed weight that somebody read."""
    while error is not None:
        frames = traceback.walk_tb(error.__traceback__)
        if "Packed" in str(error) or any(f.f_globals["__name__"].startswith("nybble.nn") for f, _ in frames):
            return True
        error = error.__cause__
    return False
