"""One run: a task, an optimizer, a seed. The forward and backward passes of a GPU are replayed as a CUDA graph.

bfloat16 autocast, gradients cut at norm 1; the rate rises over a tenth of the steps and falls in a line to zero. The
seed gives the network's start, the order of the data, masks and dropout: all optimizers see the same.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.ladder.train import hardware
from benchmarks.optimizer_quality.optimizers import CHOICES, set_rates, state_bytes
from benchmarks.optimizer_quality.tasks import Plan, Task, task_class
from torch import Tensor, nn

from nybble.core.versions import versions

POINTS = 60  # of a curve
WARM_UP = 0.1  # of the steps
WARM = 3  # passes before a graph is recorded


class Passes:
    """A network's forward and backward pass on batches of one shape; gradients lie in ``.grad`` afterwards."""

    def __init__(self, task: Task, model: nn.Module, example: tuple[Tensor, ...], mode: str) -> None:
        self.task, self.model, self.kind = task, model, task.device.split(":")[0]
        self.parameters = list(model.parameters())
        self.measure = torch.compile(task.loss, dynamic=False) if "compile" in mode else task.loss
        self.graph: torch.cuda.CUDAGraph | None = None
        if "graph" in mode:
            self._record(example)

    def __call__(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The loss, a scalar on the device that the next call overwrites."""
        if self.graph is None:
            return self._once(batch)
        for place, given in zip(self.batch, batch, strict=True):
            place.copy_(given)
        self.graph.replay()
        return self.loss

    def _once(self, batch: tuple[Tensor, ...]) -> Tensor:
        for p in self.parameters:
            p.grad = None
        # no cache of cast weights: a graph would keep the casts of the first step
        with torch.autocast(self.kind, torch.bfloat16, cache_enabled=False):
            loss = self.measure(self.model, *batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        return loss.detach()

    def _record(self, example: tuple[Tensor, ...]) -> None:
        self.batch = tuple(x.clone() for x in example)
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM):
                self._once(self.batch)
        torch.cuda.current_stream().wait_stream(aside)
        for p in self.parameters:
            p.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loss = self._once(self.batch)
        self.graph = graph


class Trainer:
    """Runs one after another on a device; the network and its graph are kept for the next run of the same task."""

    def __init__(self, data: Path, device: str, mode: str, changes: dict[str, Any], tiny: bool = False) -> None:
        self.data, self.device, self.mode, self.changes, self.tiny = data, device, mode, changes, tiny
        self.task: Task | None = None
        self.passes: Passes | None = None
        self.key: tuple[str, torch.dtype] | None = None
        self.name = self.used = ""

    def run(self, name: str, optimizer: str, seed: int) -> dict[str, Any]:
        """Train, judge; the record."""
        began = time.monotonic()
        task, choice = self._task(name), CHOICES[optimizer]
        torch.manual_seed(seed)
        start = task.model()
        passes = self._passes(name, choice.weights, task, start)
        passes.model.load_state_dict(start.state_dict())
        torch.manual_seed(seed)
        ready = time.monotonic()
        optimizers = choice.build(passes.model, task.p)
        losses = self._steps(task, passes, optimizers, seed)
        curve = [float(part.mean()) for part in losses.cpu().tensor_split(min(POINTS, task.p.steps))]
        trained = time.monotonic()
        found = self._judge(task, passes.model)
        if not math.isfinite(found["loss"]):
            print(f"{name} {optimizer} {seed}: the loss is {found['loss']}", flush=True)
        count = sum(p.numel() for p in passes.parameters)
        return {
            "task": name, "optimizer": optimizer, "seed": seed, "held_out": found,
            "curve": [round(x, 5) if math.isfinite(x) else None for x in curve],
            "steps": task.p.steps, "parameters": count, "state_bytes": state_bytes(optimizers),
            "seconds": round(time.monotonic() - began, 1), "seconds_ready": round(ready - began, 1),
            "ms_a_step": round(1e3 * (trained - ready) / task.p.steps, 3), "mode": self.used,
            "hardware": hardware(self.device.split(":")[0]), "versions": versions() | library_version(choice.needs),
        }  # fmt: skip

    def _task(self, name: str) -> Task:
        if self.task is None or self.name != name:
            self._forget()
            self.name, self.task = name, task_class(name)(self.data, plan(name, self.changes, self.tiny), self.device)
        return self.task

    def _passes(self, name: str, weights: torch.dtype, task: Task, start: nn.Module) -> Passes:
        if self.passes is not None and self.key == (name, weights):
            return self.passes
        self._forget()
        example = next(task.batches(0))
        for mode in dict.fromkeys((self.mode, "eager")):
            model = self._network(task, weights)
            try:
                made = Passes(task, model, example, mode)
                float(made(example))
            except Exception as error:
                if mode == "eager":
                    raise
                print(f"{name}, {mode}: {type(error).__name__}: {str(error)[:1000]}; goes on eagerly", flush=True)
                continue
            self.passes, self.used, self.key = made, mode, (name, weights)
            return made
        raise AssertionError("the eager mode works or raises")

    def _network(self, task: Task, weights: torch.dtype) -> nn.Module:
        """On the device, its matrices in ``weights``."""
        model = task.model().to(self.device).train()
        for p in model.parameters():
            if p.ndim > 1:
                p.data = p.data.to(weights)
        return model

    def _forget(self) -> None:
        self.passes = self.key = None
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _steps(self, task: Task, passes: Passes, optimizers: list[torch.optim.Optimizer], seed: int) -> Tensor:
        losses = torch.zeros(task.p.steps, device=self.device)
        for step, batch in enumerate(task.batches(seed)):
            losses[step] = passes(batch)
            set_rates(optimizers, factor(step, task.p.steps))
            for optimizer in optimizers:
                optimizer.step()
        return losses

    @torch.no_grad()
    def _judge(self, task: Task, model: nn.Module) -> dict[str, float]:
        model.eval()
        with torch.autocast(self.device.split(":")[0], torch.bfloat16):
            found = task.held_out(model)
        model.train()
        return {name: round(x, 6) for name, x in found.items()}


def plan(name: str, changes: dict[str, Any], tiny: bool) -> Plan:
    """A task's, with what the command line changed."""
    from dataclasses import replace

    own = task_class(name).plan
    return replace(own.tiny() if tiny else own, **changes)


def factor(step: int, steps: int) -> float:
    """Of the highest rate."""
    rise = max(1.0, WARM_UP * steps)
    return min((step + 1) / rise, (steps - step) / (steps - rise + 1))


def library_version(name: str) -> dict[str, str]:
    """Of a peer."""
    from importlib.metadata import version

    return {} if name in ("nybble", "torch") else {name: version(name)}
