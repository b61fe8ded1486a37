"""Static scales of KV caches: found of each block as it enters the window, kept in report rows, put into the plan.

The rows are what a resumed run has of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from nybble.calibration.caches import see_caches
from nybble.calibration.window import Window
from nybble.core.errors import DataError
from nybble.kv_format import KVFormat
from nybble.nn.kv_model import to_calibrate
from nybble.quantizer import Quantizer
from nybble.report.record import LayerRow
from nybble.walk.job import Job

SIDES = ("keys", "values")


def cache_rows(window: Window, path: str, formats: Mapping[str, KVFormat]) -> list[LayerRow]:
    """A row for the keys and one for the values of each of a block's attentions whose scales are static.

    Args:
        window: of the one block, its weights in float.
        path: the stream that the block reads.
        formats: by the names of attentions in it.

    Raises:
        DataError: there is no calibration data, or no layer that caches was called on it.
    """
    prefix = window.block.prefix
    if not formats:
        return []
    if not window.calibrated:
        raise DataError(f"{prefix}{next(iter(formats))}: a static KV cache is calibrated, and there is no data.")
    largest = see_caches(window.block.module, formats, prefix, window.batches(path))
    found = []
    for name, kv in formats.items():
        for side, quantizer, amax in zip(SIDES, (kv.keys, kv.values), largest[name], strict=True):
            if quantizer is not None and quantizer.static:
                found.append(_row(f"{prefix}{name}.{side}", quantizer, amax))
    return found


def _row(name: str, quantizer: Quantizer, amax: float) -> LayerRow:
    scale = quantizer.fit(torch.tensor([amax])).scale
    assert isinstance(scale, torch.Tensor)
    return LayerRow(
        name=name, shape=(0,), weights=None, inputs=str(quantizer), outputs=None, bits=0.0, sqnr=None, error=None,
        rtn_error=None, input_scale=scale.item(),
    )  # fmt: skip


def with_scales(job: Job, rows: Iterable[LayerRow]) -> Job:
    """The job, its plan's static caches with the scales that are in these rows."""
    wanted: dict[str, KVFormat] = to_calibrate(job.model, job.plan.kv)
    if not wanted:
        return job
    scales = {row.name: row.input_scale for row in rows}
    named: dict[str, Any] = dict(wanted) if isinstance(job.plan.kv, KVFormat) else dict(job.plan.kv or {})
    for name, kv in wanted.items():
        named[name] = kv.calibrated(*(scales.get(f"{name}.{side}") for side in SIDES))
    return replace(job, plan=replace(job.plan, kv=named))
