"""What a recipe learns of the whole network before it quantizes.

A ``train`` step: a first pass in memory, the training, and a float model with other weights, which a second pass in
memory is judged by. These passes are the recipe's solver and reconstructions alone: transforms would leave the weights
in another basis, and corrections change biases, which the real pass changes anew. Then transforms that learn: each gets
the float network as it is by then, and its parameters are known when the first block comes. Of several processes the
first one trains and learns, for all.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from nybble.calibration.lessons import Network, main_output
from nybble.calibration.synthesis import is_synthetic
from nybble.checkpoint.parts import LEARNED, PREPARED, Parts
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
from nybble.nn.rotation import mark_alike
from nybble.recipe import trained
from nybble.training.steps import Preparation, Trainee, TrainStep
from nybble.transforms import Learnt
from nybble.walk.job import Job
from nybble.walk.steps.make import make_preparations
from nybble.walk.steps.transform import TransformStep
from nybble.walk.walk import Walk


def training_lines(job: Job) -> list[str]:
    """What is trained, for people; raises where the memory can't hold it.

    Raises:
        UsageError, SchemeError: an unknown step or option. DataError: not enough memory.
    """
    steps, lines = make_preparations(job.recipe), list[str]()
    if steps:
        needed = require_training(job, steps)
        names = ", ".join(step.name for step in trained(job.recipe)[0])
        judged = sum(step.judges for step in steps)
        again, passes = ", and quantized again to judge that" if judged else "", len(steps) + judged
        lines.append(
            f"before it, the whole model is quantized once and trained ({names}){again}{by_one()}: about "
            f"{needed / 1e9:.2f} GB of memory{taking(job, steps, passes * job.estimate.seconds)}"
        )
    for step in _learning(job):
        sizes = {name: parameter.numel() for name, parameter in job.model.named_parameters()}
        blocks = [
            sum(sizes[f"{n}.{p}"] for p, _ in job.model.get_submodule(n).named_parameters() if f"{n}.{p}" in sizes)
            for n in job.adapter.block_names(job.model)
        ]
        tables = [size for name, size in sizes.items() if not job.adapter.inside(name)]
        needed = step.transform.learning_bytes(sum(sizes.values()), max([*blocks, *tables]))
        require_memory(needed, job.device, lambda _: _GROWS)
        what = f"before it, {step.name} learns on the whole float model{by_one()}"
        seconds = said(job, step.transform.learning_passes(_samples(job, step.transform)))
        lines.append(f"{what}: about {needed / 1e9:.2f} GB of memory{seconds}")
    return lines


def taking(job: Job, steps: Sequence[TrainStep], beside: float = 0.0) -> str:
    """How long steps take, and ``beside``, in seconds: for the end of a line; empty where nobody knows yet."""
    return said(job, sum(step.passes(_samples(job, step)) for step in steps), beside)


def said(job: Job, passes: float, beside: float = 0.0) -> str:
    """Forwards of one sample as seconds, for the end of a line; a rough guess."""
    return f", {beside + passes * job.estimate.pass_seconds:.0f} s" if job.estimate.pass_seconds else ""


def _samples(job: Job, step: Any) -> int:
    """As many as a step asks for, or those that there are."""
    known = job.tokens or job.taught
    return int(getattr(step, "samples", 0)) or (0 if known is None else len(next(iter(known.inputs.values()))))


def by_one() -> str:
    """Who trains a whole model, of several processes: a step of it is small, and one that is shared other numbers."""
    return "" if ranks.size() == 1 else ", by the first process for all"


def _learning(job: Job) -> list[TransformStep]:
    return [step for step in job.steps if isinstance(step, TransformStep) and step.transform.learns]


def elements_of(job: Job) -> int:
    """Weights of all blocks' targets."""
    return sum(t.matrices * t.shape[0] * t.shape[1] for targets in job.plan.blocks for t in targets)


def require_training(job: Job, steps: Sequence[Any]) -> int:
    """Most bytes of memory that any of them (:class:`~nybble.training.steps.TrainStep`) takes.

    Raises:
        DeviceError: there aren't as many.
    """
    elements = elements_of(job)

    def needs(steps: Sequence[TrainStep]) -> int:
        return max(step.working_bytes(elements, job.dtype) for step in steps)

    def fitting(free: int) -> str:
        rooms = [{name: 0.0 for name in _ROOMS if hasattr(step, name)} for step in steps]
        least = needs([replace(step, **room) for step, room in zip(steps, rooms, strict=True)])
        said = ", ".join(f"{name}: 0" for name in _ROOMS if any(name in room for room in rooms))
        return f"With {said} in the recipe it takes {least / 1e9:.1f} GB." if least <= free else _GROWS

    needed = needs(steps)
    require_memory(needed, job.device, fitting)
    return needed


_ROOMS = ("dense_gb", "logits_gb")
"""Options that let a training have memory for what it could make anew."""
_GROWS = (
    "It grows with the model, not with the samples: leave the step out of the recipe, or take a device with more of it."
)


def prepared(job: Job, data: Data, parts: Parts | None = None, progress: Progress | None = None) -> Job:
    """The job over the weights that its recipe's training steps come to; the job itself where there are none.

    Args:
        job: checked. A model in memory gets the weights in place.
        data: as for the job.
        parts: of an unfinished run: what training came to is kept there, and taken from there.
        progress: told of the first pass.
    """
    for number, step in enumerate(make_preparations(job.recipe)):
        path = None if parts is None else parts.parts / f"{number}-{PREPARED}"
        if path is not None and ranks.lead_says(path.exists()):
            tensors = _read(path)
        else:
            tensors = _trained(job, step, data, progress or Silent())
            if path is not None and ranks.leads():
                write_tensorfile(path, tensors, {})
        job = _with_weights(job, tensors)
    return _taught(job, data, parts)


def _taught(job: Job, data: Data, parts: Parts | None) -> Job:
    """The job with what its transforms learned of the whole network."""
    steps = list(job.steps)
    for number, step in enumerate(job.steps):
        if not isinstance(step, TransformStep) or not step.transform.learns:
            continue
        path = None if parts is None else parts.parts / f"{number}-{LEARNED}"
        if path is not None and ranks.lead_says(path.exists()):
            found = _learnt(path)
        else:
            learn = partial(_learned, job, step, data)
            found = ranks.lead_makes(learn, torch.device("cpu"))
            if path is not None and ranks.leads():
                write_tensorfile(path, found.parameters, {"entry": json.dumps(found.entry)})
        steps[number] = step.taught(found)
    return replace(job, steps=tuple(steps))


def _learnt(path: Path) -> Learnt:
    """What an earlier run kept."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        entry = json.loads(file.metadata()["entry"])
    return Learnt(parameters=_read(path), entry=entry)


def _learned(job: Job, step: TransformStep, data: Data) -> Learnt:
    return step.transform.learn(_network(job, step, data))


def _network(job: Job, step: TransformStep, data: Data) -> Network:
    """The float network in memory, and what it is taught with."""
    if job.source is None:
        model = copy.deepcopy(job.model).float().to(job.device)
    else:
        model = job.source.model(torch.float32, job.device)
        mark_alike(model, job.model)
    count, batch = batches_of(job, samples_for(job, step.transform, data))
    names = [*job.adapter.block_names(job.model), ""]
    targets = dict(zip(names, [*job.plan.blocks, job.plan.outside], strict=True))
    asked = getattr(step.transform, "loss", "auto")
    return Network(
        model=model.eval(), adapter=job.adapter, targets=targets, products=job.products, samples=count,
        batch=batch, wanted=None if asked == "next-token" else _float_output(job),
        seed=job.settings.seed, speaks=job.tells_next and job.adapter.head is not None,
    )  # fmt: skip


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


def _trained(job: Job, step: Preparation, data: Data, progress: Progress) -> dict[str, Tensor]:
    """float32 parameters by full name, on the CPU: of everything that the scheme quantizes, or none at all.

    Of a step that judges, none unless a pass over what it came to is better than the first one.
    """
    first = _first_pass(job, data, progress)
    before = _judged(job, first, step, data)
    with products_in(job.products), evaluation_mode(first.model):
        changed = ranks.lead_makes(partial(_run, job, first, step, data), job.device)
    found: dict[str, Tensor] = {}
    for name, target, module in targets_in(first) if changed else ():  # else the float weights stay
        matrix = changed.get(name, _dense(module))
        if matrix is not None:
            found |= _parameters(job.model, name, target, matrix)
    if before is None or not found:
        return found
    del first, changed  # its floats too
    after = _judged(job, _first_pass(job, data, progress, found), step, data)
    return found if after is not None and after < before else {}


def _run(job: Job, made: Job, step: Preparation, data: Data) -> Mapping[str, Tensor]:
    return step.run(_trainee(job, made, step, data))


def _judged(job: Job, made: Job, step: Preparation, data: Data) -> float | None:
    """What a step says of a pass; the first process asks it."""
    with products_in(job.products), evaluation_mode(made.model):
        return ranks.lead_alone(lambda: step.judge(_trainee(job, made, step, data)))


def _trainee(job: Job, made: Job, step: Preparation, data: Data) -> Trainee:
    """What a pass made, to be trained or judged."""
    layers = {name: module for name, _, module in targets_in(made) if _is_layer(module)}
    count, batch = batches_of(job, samples_for(job, step, data))
    wanted = None if _tells_next_token(step, job, made.model) else _float_output(job)
    return Trainee(
        model=made.model, layers=layers, samples=count, batch=batch, wanted=wanted, seed=job.settings.seed
    )  # fmt: skip


def _first_pass(job: Job, data: Data, progress: Progress, tensors: Mapping[str, Tensor] | None = None) -> Job:
    """A quantized copy of the model, in memory; ``tensors``: float weights in place of the model's."""
    kept = tuple(step for step in job.recipe.steps if step.kind in ("solver", "reconstruction"))
    recipe = replace(job.recipe, steps=kept)
    model = copy.deepcopy(job.model) if job.source is None else job.source.skeleton(job.dtype)
    settings = replace(
        job.settings, resume=False, spill=False, products=job.products if job.source is not None else None
    )
    made = Job.make(model, job.source, recipe, job.tokens or data, settings)
    made = made if tensors is None else _with_weights(made, tensors)
    Walk({"": made}).run(None, progress)
    return made


def targets_in(job: Job) -> list[tuple[str, Target, nn.Module]]:
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


def batches_of(
    job: Job, samples: Samples
) -> tuple[int, Callable[[list[int]], tuple[Mapping[str, Tensor], Tensor | None]]]:
    """How many samples there are, and what makes a batch of some: inputs on the device, and which tokens are real."""

    def batch(numbers: list[int]) -> tuple[Mapping[str, Tensor], Tensor | None]:
        chosen = {name: tensor[numbers] for name, tensor in samples.inputs.items()}
        made = job.kind.batch(chosen, 0, len(numbers), job.device)
        return made.inputs, made.real

    return next(iter(samples.inputs.values())).shape[0], batch


def samples_for(job: Job, step: Any, data: Data) -> Samples:
    """What is learned from: of a SRC as many as the step wants, else what the job is calibrated on."""
    asked, known = int(getattr(step, "samples", 0)), job.tokens or job.taught
    if known is not None and not (asked and isinstance(data, str | Path) and not is_synthetic(data)):
        return known
    settings = job.settings
    wanted = Wanted(
        part="calibration", samples=asked or settings.wanted().samples, seq_len=settings.seq_len,
        seed=settings.seed, fewer=True,
    )  # fmt: skip
    origin: Origin = InMemory(job.model.config) if job.source is None else job.source
    samples = samples_of(data, job.kind, origin, wanted, getattr(job.model, "main_input_name", "input_ids"))
    return job.kind.fitted(samples, job.model)


def _tells_next_token(step: Any, job: Job, model: nn.Module) -> bool:
    asked = getattr(step, "loss", "auto")
    return asked == "next-token" or (asked == "auto" and job.tells_next)


def _float_output(job: Job) -> Callable[[Mapping[str, Tensor]], Tensor]:
    model = job.model if job.source is None else job.source.model(job.dtype, job.device)

    @torch.no_grad()
    def output(inputs: Mapping[str, Tensor]) -> Tensor:
        with evaluation_mode(model):
            return main_output(model(**inputs))

    return output
