"""Calibration inputs for a model whose data nobody has: made of its BatchNorms' statistics, before the walk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nybble.calibration.synthesis import Synthesis, SyntheticSamples, require_norms, synthesise, synthetic_count
from nybble.core.errors import DataError
from nybble.walk.settings import DEFAULT_SAMPLES, Settings

if TYPE_CHECKING:
    from nybble.models.sources import ModelSource


def synthesised(
    src: str,
    model: Any,
    source: ModelSource | None,
    example: Mapping[str, Tensor] | None,
    settings: Settings,
    device: torch.device,
) -> SyntheticSamples:
    """What ``synthetic[:COUNT]`` means for a model: the settings say how many where it doesn't, and the seed.

    Args:
        src: the SRC.
        model: in memory, or the source's skeleton.
        source: where its weights are; None for a model in memory.
        example: one sample; None where the kind of data can't make one.
        settings: of the run.
        device: where to run.

    Raises:
        UsageError: another count. ModelError: no BatchNorms. DataError: nothing says what inputs are like.
    """
    count = synthetic_count(src) or settings.samples or DEFAULT_SAMPLES
    require_norms(model)
    if example is None:
        raise DataError(
            f"nothing says how large inputs of {type(model).__name__} are, so none can be synthesised from here; in "
            "Python, nybble.calibration.synthesis.synthesise(model, example) makes some for data=."
        )
    float_model = model if source is None else source.model(torch.float32, device)
    made = synthesise(float_model, example, Synthesis(samples=count, batch=settings.batch, seed=settings.seed))
    return replace(made, source=src)
