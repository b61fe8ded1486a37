"""What a recipe trains before it quantizes: a first pass in memory, the training, and a float model with other weights.

The first pass is the recipe's solver and reconstructions alone: transforms would leave the weights in another basis,
and corrections change biases, which the real pass changes anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from nybble.checkpoint.parts import Parts
from nybble.core import ranks
from nybble.core.device import require_memory
from nybble.core.products import products_in
from nybble.core.progress import Progress, Silent
from nybble.core.tensorfile import write_tensorfile
from nybble.data import InMemory, Origin, Samples
from nybble.data.given import Data, samples_of
from nybble.data.samples import Wanted
from nybble.models.sources.changed import ChangedSource
from nybble.nn.experts import PackedExperts
from nybble.nn.in_place import evaluation_mode
from nybble.nn.kinds import Target
from nybble.nn.layer import QuantLayer
from nybble.nn.packed import Packed
from nybble.recipe import Recipe
from nybble.training.steps import Trainee, TrainStep, main_output, make_train_step
from nybble.walk.job import Job
from nybble.walk.walk import Walk

FILE = "prepared.safetensors"
"""In the folder of an unfinished run's parts: float weights after training, for a run that goes on from it."""


def training_of(recipe: Recipe) -> list[TrainStep]:
    """The training steps of a recipe that are not turned off."""
    made = [make_train_step(step.name, step.options) for step in recipe.steps if step.kind == "train"]
    return [step for step in made if not step.idle]


def training_lines(job: Job) -> list[str]:
    """What is trained, for people; raises where the memory can't hold it.

    Raises:
        UsageError, SchemeError: an unknown step or option. DataError: not enough memory.
    """
    steps = training_of(job.recipe)
    if not steps:
        return []
    elements = sum(t.matrices * t.shape[0] * t.shape[1] for targets in job.plan.blocks for t in targets)
    needed = max(step.working_bytes(elements, job.dtype) for step in steps)
    require_memory(needed, job.device)
    names = ", ".join(step.name for step in job.recipe.steps if step.kind == "train")
    return [
        f"before it, the whole model is quantized once and trained ({names}): about {needed / 1e9:.2f} GB of memory"
    ]


def prepared(job: Job, data: Data, parts: Parts | None = None, progress: Progress | None = None) -> Job:
    """The job over the weights that its recipe's training steps come to; the job itself where there are none.

    Args:
        job: checked. A model in memory gets the weights in place.
        data: as for the job.
        parts: of an unfinished run: what training came to is kept there, and taken from there.
        progress: told of the first pass.
    """
    for number, step in enumerate(training_of(job.recipe)):
        path = None if parts is None else parts.parts / f"{number}-{FILE}"
        if path is not None and ranks.lead_says(path.exists()):
            tensors = _read(path)
        else:
            tensors = _trained(job, step, data, progress or Silent())
            if path is not None and ranks.leads():
                write_tensorfile(path, tensors, {})
        job = _with_weights(job, tensors)
    return job


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found: dict[str, Tensor] = load_file(path)
    return found


def _with_weights(job: Job, tensors: Mapping[str, Tensor]) -> Job:
    if job.source is not None:
        return replace(job, source=ChangedSource(job.source, tensors))
    for name, tensor in tensors.items():
        parameter = job.model.get_parameter(name)
        parameter.data = tensor.to(parameter.device, parameter.dtype)
    return job


def _trained(job: Job, step: TrainStep, data: Data, progress: Progress) -> dict[str, Tensor]:
    """float32 parameters by full name, on the CPU: of everything that the scheme quantizes."""
    first = _first_pass(job, data, progress)
    layers = {name: module for name, _, module in _targets(first) if _is_layer(module)}
    samples = _samples(job, step, data)
    kind = job.kind

    def batch(numbers: list[int]) -> tuple[Mapping[str, Tensor], Tensor | None]:
        chosen = {name: tensor[numbers] for name, tensor in samples.inputs.items()}
        made = kind.batch(chosen, 0, len(numbers), job.device)
        return made.inputs, made.real

    count = next(iter(samples.inputs.values())).shape[0]
    with products_in(job.products), evaluation_mode(first.model):
        wanted = None if _tells_next_token(step, job, first.model) else _float_output(job)
        trainee = Trainee(
            model=first.model, layers=layers, samples=count, batch=batch, wanted=wanted, seed=job.settings.seed
        )
        changed = step.run(trainee)
    found: dict[str, Tensor] = {}
    for name, target, module in _targets(first):
        matrix = changed.get(name, _dense(module))
        if matrix is not None:
            found |= _parameters(job.model, name, target, matrix)
    return found


def _first_pass(job: Job, data: Data, progress: Progress) -> Job:
    """A quantized copy of the model, in memory."""
    kept = tuple(step for step in job.recipe.steps if step.kind in ("solver", "reconstruction"))
    recipe = replace(job.recipe, steps=kept)
    model = copy.deepcopy(job.model) if job.source is None else job.source.skeleton(job.dtype)
    settings = replace(
        job.settings, resume=False, spill=False, products=job.products if job.source is not None else None
    )
    made = Job.make(model, job.source, recipe, job.tokens or data, settings)
    Walk({"": made}).run(None, progress)
    return made


def _targets(job: Job) -> list[tuple[str, Target, nn.Module]]:
    """What a finished job quantized: full name, target, and the module that has its codes."""
    names = [*job.adapter.block_names(job.model), ""]
    found = []
    for name, targets in zip(names, [*job.plan.blocks, job.plan.outside], strict=True):
        for target in targets:
            full = f"{name}.{target.name}" if name else target.name
            found.append((full, target, job.model.get_submodule(full)))
    return found


def _is_layer(module: nn.Module) -> TypeGuard[QuantLayer]:
    return isinstance(module, QuantLayer) and isinstance(module.weight, Packed)


def _dense(module: nn.Module) -> Tensor | None:
    """float32, a target's matrix (all of a fused one's); None where its weights are float."""
    if isinstance(module, PackedExperts):
        experts = [packed.qtensor().dequantize() for packed in module.experts if isinstance(packed, Packed)]
        return torch.stack(experts)
    weight = getattr(module, "weight", None)
    return weight.qtensor().dequantize() if isinstance(weight, Packed) else None


def _parameters(model: nn.Module, name: str, target: Target, matrix: Tensor) -> dict[str, Tensor]:
    """A matrix as the float model's parameters, by full name."""
    path = name.removesuffix(f".{target.leaf}") if target.leaf else name
    values = target.kind.values(model.get_submodule(path), target.leaf, matrix)
    shapes = {leaf: model.get_parameter(f"{path}.{leaf}").shape for leaf in values}
    return {f"{path}.{leaf}": v.reshape(shapes[leaf]).contiguous().cpu() for leaf, v in values.items()}


def _samples(job: Job, step: TrainStep, data: Data) -> Samples:
    """What is trained on: of a SRC as many as the step wants, else what the job is calibrated on."""
    if job.tokens is not None and not (step.samples and isinstance(data, str | Path)):
        return job.tokens
    settings = job.settings
    wanted = Wanted(
        part="calibration", samples=step.samples or settings.wanted().samples, seq_len=settings.seq_len,
        seed=settings.seed, fewer=True,
    )  # fmt: skip
    origin: Origin = InMemory(job.model.config) if job.source is None else job.source
    samples = samples_of(data, job.kind, origin, wanted, getattr(job.model, "main_input_name", "input_ids"))
    return job.kind.fitted(samples, job.model)


def _tells_next_token(step: Any, job: Job, model: nn.Module) -> bool:
    asked = getattr(step, "loss", "auto")
    return asked == "next-token" or (asked == "auto" and job.adapter.reads == "tokens")


def _float_output(job: Job) -> Callable[[Mapping[str, Tensor]], Tensor]:
    model = job.model if job.source is None else job.source.model(job.dtype, job.device)

    @torch.no_grad()
    def output(inputs: Mapping[str, Tensor]) -> Tensor:
        with evaluation_mode(model):
            return main_output(model(**inputs))

    return output
