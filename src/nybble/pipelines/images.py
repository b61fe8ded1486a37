"""Images from a packed (or float) diffusion model: its pipeline as diffusers has it, and latents for a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.calibration.trajectory import Conditions, Sampling, class_labels, noise_for, scheduler_of, steps
from nybble.core.explicit import explicit_settings
from nybble.core.guard import reading
from nybble.core.seeds import preserve_global_rng
from nybble.models.own._denoiser import diffusers
from nybble.models.pipeline_parts import read_parts
from nybble.nn.in_place import evaluation_mode
from nybble.pipelines.load import load_with_origin


@explicit_settings()
def load_pipeline(
    folder: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu"
) -> Any:
    """A pipeline's folder, quantized or not, as the diffusers pipeline that it is of; no code of the folder runs.

    Args:
        folder: with ``model_index.json``: what nybble wrote, or a float pipeline.
        dtype: of the denoiser's float parts; other parts are in float32.
        device: where to.

    Raises:
        NybbleError: the folder can't be read, or diffusers has no such pipeline.
    """
    parts = read_parts(Path(folder))
    loaded, _ = load_with_origin(folder, dtype=dtype, device=device)
    with reading(f"the pipeline of {folder}"):
        cls = getattr(diffusers(), parts.pipeline)
        made = cls.from_pretrained(
            str(folder), **{parts.denoiser: loaded.net}, local_files_only=True, use_safetensors=True
        )
        return made.to(device)


@torch.no_grad()
def sample_latents(
    model: Any,
    scheduler_config: dict[str, Any],
    count: int,
    sampling: Sampling | None = None,
    conditions: Conditions | None = None,
    batch: int = 64,
) -> Tensor:
    """Latents (of a model of pixels, images in -1 .. 1) for a seed: the same noise for whatever model.

    Args:
        model: a denoiser, float or quantized.
        scheduler_config: of its pipeline.
        count: how many.
        sampling: steps, seed.
        conditions: what they are of, samples in front; default, classes at random.
        batch: samples at a time; each has noise of its own, whatever the batch.

    Returns:
        float32 [count, channels, rows, columns], on the CPU.
    """
    sampling = sampling or Sampling()
    device = next(model.parameters()).device
    given = class_labels(model, count, sampling.seed) if conditions is None else conditions
    found = []
    with preserve_global_rng(), evaluation_mode(model):
        for first in range(0, count, batch):
            some = {name: tensor[first : first + batch].to(device) for name, tensor in given.items()}
            noise = noise_for(model, min(batch, count - first), sampling.seed, first=first).to(device)
            scheduler = scheduler_of(scheduler_config, "the pipeline")
            *_, (_, _, last) = steps(model, scheduler, noise, some, sampling)
            found.append(last.cpu())
    return torch.cat(found)
