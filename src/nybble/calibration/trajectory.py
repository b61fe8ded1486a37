"""What a diffusion model calls its denoiser with while it samples: steps from noise to an image, and calibration data.

    x_T ~ N(0, s^2 I);   for t = T .. 1:  e = net(x_t, t, c),   x_{t-1} = scheduler(e, t, x_t)

The scheduler is diffusers' own, as the pipeline's folder configures it. With guidance g (Ho and Salimans 2022,
arXiv:2207.12598) the network runs with and without the condition, and e = e_0 + g (e_c - e_0).
Calibration samples are taken along the whole way of the float model (Li et al. 2023, Q-Diffusion, arXiv:2302.04304):
what comes late is unlike what comes early.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError, UsageError
from nybble.core.guard import reading
from nybble.core.options import at_least_one
from nybble.core.seeds import generator
from nybble.models.own._denoiser import diffusers
from nybble.nn.in_place import evaluation_mode

Conditions = Mapping[str, Tensor]
"""What images are to be of, by the denoiser's arguments, samples in front."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are sampled.

    Attributes:
        steps: of the scheduler. guidance: 1 runs the network with the condition alone.
        seed: of the noise, that of the scheduler's own included.
        late: a share of the way; calibration samples come from behind it alone. 0: from all of it.
    """

    steps: int = 20
    guidance: float = 1.0
    seed: int = 0
    late: float = 0.0

    def __post_init__(self) -> None:
        at_least_one(steps=self.steps)
        if not 0 <= self.late < 1 or self.guidance < 0:
            raise UsageError(
                f"late={self.late:g} is a share of the way, below 1; guidance={self.guidance:g} 0 or more."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class TrajectorySamples:
    """Inputs of the denoiser.

    Attributes:
        inputs: ``latents`` float32, ``timestep`` and conditions; samples in front.
        tokens: places of all latents. sha256: of the inputs' bytes. made: how, for the manifest.
    """

    inputs: dict[str, Tensor]
    tokens: int
    sha256: str
    made: Mapping[str, Any]
    source: str = "builtin"

    @property
    def available(self) -> int:
        """All."""
        return len(self.inputs["latents"])

    def manifest(self) -> dict[str, Any]:
        """What stands beside every number from these inputs."""
        return {"source": self.source, "inputs_sha256": self.sha256, "samples": self.available, **self.made}


def scheduler_of(config: Mapping[str, Any], place: object) -> Any:
    """Diffusers' scheduler of a ``scheduler_config.json``.

    Raises:
        ModelError: diffusers has no such scheduler. FileError: it doesn't take what the file says.
    """
    name = str(config.get("_class_name", ""))
    found = getattr(diffusers(), name, None) if name.endswith("Scheduler") else None
    if found is None or not hasattr(found, "from_config"):
        raise ModelError(f"{place} names the scheduler {name!r}, which the installed diffusers doesn't know.")
    with reading(place):
        return found.from_config({key: value for key, value in config.items() if not key.startswith("_")})


def steps(
    model: nn.Module,
    scheduler: Any,
    noise: Tensor,
    conditions: Conditions,
    sampling: Sampling,
    null: Conditions | None = None,
) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Go from noise to latents.

    Args:
        model: a :class:`~nybble.models.own._denoiser.Denoiser`, in eval mode; float or quantized.
        scheduler: of :func:`scheduler_of`; its timesteps are set here.
        noise: N(0, 1), float32 [samples, channels, rows, columns], on the model's device.
        conditions: of the samples.
        sampling: how.
        null: of no condition, for guidance.

    Yields:
        After every step what the network was called with, its answer for the condition (the noise that it sees, float32
        [samples, channels, rows, columns]), and the latents then. With guidance the inputs have twice as many samples.
    """
    guided = null is not None and sampling.guidance != 1
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    scheduler.set_timesteps(sampling.steps, device=noise.device)
    x = noise * float(scheduler.init_noise_sigma)
    given = {n: torch.cat([t, null[n]]) if guided and null else t for n, t in conditions.items()}
    given = {n: t.to(dtype) if t.is_floating_point() else t for n, t in given.items()}
    draws = generator(sampling.seed, "scheduler")
    takes = {"generator": draws} if "generator" in scheduler.step.__code__.co_varnames else {}
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
        inputs = {"latents": scaled.to(dtype), "timestep": t.expand(len(scaled)).to(scaled.device), **given}
        told = model(**inputs).logits.float()
        told = told[:, : x.shape[1]]  # behind it, some tell the variance
        seen, free = told.chunk(2) if guided else (told, told)
        x = scheduler.step(free + sampling.guidance * (seen - free) if guided else told, t, x, **takes).prev_sample
        yield inputs, seen, x


def noise_for(model: Any, count: int, seed: int, size: tuple[int, int] | None = None, first: int = 0) -> Tensor:
    """Noise of samples ``first .. first + count``, drawn on the CPU: float32 [count, channels, rows, columns].

    Raises:
        UsageError: a size that the network can't make.
    """
    own = model.config.latent_size
    rows, columns = size or own
    if min(rows, columns) < 1:
        raise UsageError(f"the config of this {model.config.denoiser} says no sample_size; give a size.")
    fixed = any("pos_embed" in getattr(part, "_buffers", {}) for part in model.modules())
    if size is not None and fixed and size[0] != size[1]:
        raise UsageError(f"{model.config.denoiser} makes square images; {rows} x {columns} is none.")
    parts = [part.generator for part in map(_Draw, range(first, first + count), [seed] * count)]
    return torch.stack([torch.randn(model.config.channels, rows, columns, generator=part) for part in parts])


class _Draw:
    """One sample's own numbers, the same in whatever batch it comes."""

    def __init__(self, number: int, seed: int) -> None:
        self.generator = generator(seed, "noise", str(number))


def class_labels(model: Any, count: int, seed: int) -> dict[str, Tensor]:
    """Classes at random where the network knows some, int64 [count]; else nothing.

    Raises:
        UsageError: the network reads text, which nothing here can make.
    """
    network = model.config.network
    classes = network.get("num_class_embeds") or network.get("num_embeds_ada_norm")
    if network.get("caption_channels") or network.get("cross_attention_dim"):
        raise UsageError(
            f"{model.config.denoiser} reads text: give a file with a prompt a line (--data), or in Python its states "
            "(data={'latents': ..., 'timestep': ..., 'encoder_hidden_states': ...})."
        )
    if not classes:
        return {}
    return {"class_labels": torch.randint(int(classes), (count,), generator=generator(seed, "classes"))}


@torch.no_grad()
def trajectory_samples(
    model: Any,
    scheduler: Any,
    count: int,
    sampling: Sampling | None = None,
    conditions: Callable[[int], Conditions] | None = None,
    source: str = "builtin",
    batch: int = 16,
) -> TrajectorySamples:
    """Calibration samples along the float model's own way, evenly from all steps.

    Args:
        model: float, on its device; left as it is.
        scheduler: its pipeline's.
        count: how many samples; of every image each step is one.
        sampling: how they are sampled; ``seed`` also orders them.
        conditions: what so many images are of; default, classes at random.
        source: what the user named.
        batch: images that are sampled together.
    """
    sampling = sampling or Sampling()
    at_least_one(samples=count)
    device = next(model.parameters()).device
    used = sampling.steps - int(sampling.steps * sampling.late)
    images = -(-count // used)
    given = (conditions or (lambda n: class_labels(model, n, sampling.seed)))(images)
    found: dict[str, list[Tensor]] = {}
    with evaluation_mode(model):
        for first in range(0, images, batch):
            some = {name: tensor[first : first + batch].to(device) for name, tensor in given.items()}
            noise = noise_for(model, min(batch, images - first), sampling.seed, first=first).to(device)
            for number, (inputs, _, _) in enumerate(steps(model, scheduler, noise, some, sampling)):
                if number >= sampling.steps - used:
                    for name, tensor in inputs.items():
                        found.setdefault(name, []).append(tensor.cpu())
    order = torch.randperm(images * used, generator=generator(sampling.seed, "order"))[:count]
    inputs = {name: torch.cat(tensors)[order] for name, tensors in found.items()}
    inputs["latents"] = inputs["latents"].float()
    if not bool(inputs["latents"].isfinite().all()):
        raise ModelError("the float model's own samples come to NaN or infinity; run it in float32, or in bfloat16.")
    digest = hashlib.sha256()
    for name, tensor in inputs.items():
        digest.update(
            f"{name} {list(tensor.shape)}\0".encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes()
        )
    made = {"images": images, "steps": sampling.steps, "guidance": sampling.guidance, "seed": sampling.seed}
    made |= {"late": sampling.late} if sampling.late else {}
    return TrajectorySamples(
        inputs=inputs, tokens=inputs["latents"][:, 0].numel(), sha256=digest.hexdigest(), made=made, source=source
    )
