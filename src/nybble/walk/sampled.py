"""Calibration inputs of a diffusion model: the float model samples images, before the walk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nybble.calibration.prompts import prompt_conditions
from nybble.calibration.trajectory import Sampling, TrajectorySamples, scheduler_of, trajectory_samples
from nybble.core.errors import UsageError
from nybble.models.pipeline_parts import SCHEDULER, scheduler_config
from nybble.models.sources.pipeline import PipelineSource
from nybble.walk.settings import DEFAULT_SAMPLES, Settings

if TYPE_CHECKING:
    from nybble.models.sources import ModelSource


def sampled(
    src: str, model: Any, source: ModelSource | None, settings: Settings, device: torch.device
) -> TrajectorySamples:
    """What a SRC means for a diffusion model: ``builtin``, classes at random; else a file with a prompt a line.

    Args:
        src: the SRC.
        model: in memory, or the source's skeleton.
        source: the pipeline's place; without one nobody knows the scheduler.
        settings: of the run: how many samples, the seed.
        device: where to run.

    Raises:
        UsageError: no pipeline, or a model of text without prompts. FileError, ModelError: a bad part.
    """
    if not isinstance(source, PipelineSource):
        raise UsageError(
            f"what {type(model).__name__} is called with follows from its scheduler: give the pipeline's folder, or "
            "samples as data (nybble.calibration.trajectory.trajectory_samples makes them)."
        )
    folder = source.parts.folder
    scheduler = scheduler_of(scheduler_config(folder), folder / SCHEDULER)
    found = source.model(torch.float32, device)
    conditions = None if src == "builtin" else prompt_conditions(Path(src), source.parts, found)
    return trajectory_samples(
        found, scheduler, settings.samples or DEFAULT_SAMPLES, Sampling(seed=settings.seed), conditions, src
    )
