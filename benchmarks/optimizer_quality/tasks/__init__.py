"""The six kinds of task: one file each; :class:`Task` is what a run needs of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from benchmarks.optimizer_quality.pack import read
from torch import Tensor, nn

NAMES = ("lm", "mlm", "classify", "images", "translate", "pairs")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a task is trained.

    Attributes:
        width, layers, heads, context: of the network.
        steps, batch: of the training.
        rate, decay, betas: AdamW's; the decay is of matrices, the rate the highest.
        dropout: of residual branches.
        seconds: of one run with torch's AdamW alone on an H100, for estimates until there are measurements.
        judged: held-out samples at most.
    """

    width: int
    layers: int
    heads: int
    context: int
    steps: int
    batch: int
    rate: float
    decay: float
    betas: tuple[float, float]
    dropout: float = 0.0
    seconds: float
    judged: int = 1 << 30

    def tiny(self) -> Plan:
        """Some seconds of a CPU: everything runs, nothing is learned."""
        return replace(self, width=64, layers=1, heads=2, context=32, steps=4, batch=8, judged=32)


class Task(ABC):
    """A network, its batches in the order of a seed, its loss, and its loss on what was held out.

    Args:
        data: the file of --pack.
        plan: how to train; the task's own by default.
        device: of the data.
    """

    title: ClassVar[str]
    unit: ClassVar[str]
    plan: ClassVar[Plan]
    arrays: ClassVar[tuple[str, ...]]
    muon: ClassVar[bool] = True  # there are hidden matrices

    def __init__(self, data: Path, plan: Plan | None = None, device: str = "cpu") -> None:
        self.p, self.device = plan or self.plan, device
        arrays, self.about = read(data, *self.arrays)
        self.load(arrays)

    @abstractmethod
    def load(self, arrays: dict[str, Any]) -> None:
        """Put the data where it is used."""

    @abstractmethod
    def model(self) -> nn.Module:
        """The untrained network, on the CPU, of torch's global generator."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[tuple[Tensor, ...]]:
        """What each step gets: tensors on the device, of the same shapes at every step."""

    @abstractmethod
    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """A scalar, differentiable."""

    @abstractmethod
    def held_out(self, model: nn.Module) -> dict[str, float]:
        """``loss`` on the held-out part, and what else says something (``accuracy``)."""

    def order(self, samples: int, seed: int) -> Iterator[Tensor]:
        """Indices of each step, int64 [batch] on the device; every pass takes each sample once at most."""
        generator = torch.Generator().manual_seed(seed)
        each = samples // self.p.batch
        if not each:
            raise SystemExit(f"{samples} samples are fewer than a batch of {self.p.batch}")
        for step in range(self.p.steps):
            if step % each == 0:
                order = torch.randperm(samples, generator=generator).to(self.device)
            start = step % each * self.p.batch
            yield order[start : start + self.p.batch]


def task_class(name: str) -> type[Task]:
    """By name; each is ``TASK`` of its file."""
    found: type[Task] = import_module(f"{__name__}.{name}").TASK
    return found
