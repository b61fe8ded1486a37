"""What a search of an architecture works with, and what it gives."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from nybble.core.errors import FileError, UsageError
from nybble.core.files import atomic_write_json
from nybble.core.progress import Progress, Silent
from nybble.core.seeds import derive_seed
from nybble.data.samples import Origin
from nybble.nn.in_place import evaluation_mode
from nybble.search.architectures._budget import Budget
from nybble.search.kept import Kept
from nybble.training.callbacks import Acting
from nybble.training.objective import Objective
from nybble.training.settings import TrainSettings
from nybble.training.state import load_state, save_state
from nybble.training.tasks import Row, Task, TaskData, task_of

TOGETHER = 64
"""Examples of a forward that judges."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training as an option of a method: the fields of :class:`~nybble.training.settings.TrainSettings` for it."""

    steps: int | None = None
    epochs: int = 1
    batch: int = 64
    accumulate: int = 1
    lr: float = 5e-4
    warmup: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    clip: float = 1.0
    optimizer: str = "torch.AdamW"
    augment: str = ""
    dtype: str = "float32"
    save_every: int = 200

    def __post_init__(self) -> None:
        TrainSettings(**vars(self))  # which refuses wrong values

    def settings(self, study: Study, name: str) -> TrainSettings:
        """At a study's place, with a seed of its own; it goes on where an earlier run was killed."""
        seed = derive_seed(study.seed, "search", name) % 2**31
        return TrainSettings(
            **vars(self), device=study.device, seed=seed, resume=True, seq_len=study.seq_len, checkpointing=False
        )


@dataclass(frozen=True, kw_only=True)
class Study:
    """See the module.

    Attributes:
        name: what the user called the model or space.
        model: float32, on its device, in evaluation mode; None where a space is searched.
        space: what the YAML file of a space says; empty where there is a model.
        origin: the place of the model, or of the one that a space names under ``like``: its tokenizer, how images are
            prepared; None where it names none.
        budget: of what is found. data, judged_on: a SRC each, as the user gave them.
        seq_len: most tokens of an example. seed: of every random choice. device: of models.
        folder: for what a killed run goes on with, and removed at the end; None before the first check.
        keep: numbers that were measured. progress: told of each step. announce: gets lines for people.
        seconds: of each training, by name; filled here.
    """

    name: str
    budget: Budget
    model: Any = None
    space: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin | None = None
    data: str | None = None
    judged_on: str | None = None
    seq_len: int = 256
    seed: int = 0
    device: str = "cpu"
    folder: Path | None = None
    keep: Kept = field(default_factory=Kept)
    progress: Progress = field(default_factory=Silent)
    announce: Callable[[str], None] = lambda line: None
    seconds: dict[str, float] = field(default_factory=dict)

    def task(self, model: nn.Module) -> Task:
        """What a network of the space does."""
        return task_of(model, self.name)

    def examples(self, model: nn.Module) -> TaskData:
        """Labelled examples to train on.

        Raises:
            UsageError: none were given. DataError: they don't fit the model.
        """
        return self._read(model, self.data, "--data")

    def held_out(self, model: nn.Module) -> TaskData:
        """Labelled examples to judge with; errors as of :meth:`examples`."""
        return self._read(model, self.judged_on, "--eval")

    def _read(self, model: nn.Module, src: str | None, option: str) -> TaskData:
        if src is None:
            raise UsageError(f"this method needs examples of what the model does; give {option} SRC.")
        if self.origin is None:
            raise UsageError(f"{self.name} names no model under 'like', whose tokenizer or preparation the data needs.")
        part = "calibration" if option == "--data" else "evaluation"
        return self.task(model).load(src, self.origin, model, self.seq_len, part)  # type: ignore[arg-type]

    def train(
        self, name: str, model: nn.Module, rows: Sequence[Row], training: Training, *,
        objective: Objective | None = None, groups: Sequence[Mapping[str, Any]] | None = None,
        callbacks: Mapping[str, Acting] | None = None, task: Task | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """One training by nybble's loop (:func:`nybble.training.loop.train`); one that is done isn't done again.

        Args:
            name: its own in this search; a word.
            model: in float32; what wants gradients trains. In evaluation mode afterwards.
            rows: examples of the task.
            training: sizes and rates.
            objective: as of the loop.
            groups: as of the loop.
            callbacks: as of the loop.
            task: of the rows; left out: the model's own.

        Returns:
            ``steps``, ``curve`` and what else a :class:`~nybble.training.loop.Run` has.
        """
        from nybble.training.loop import train  # the Trainer, which takes seconds

        if self.folder is None:
            raise FileError(f"{name}: a study without a folder trains nothing.")
        folder = self.folder / name
        note, weights = folder / "run.json", folder / "trained.safetensors"
        if not note.exists():
            folder.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            run = train(
                model, rows, training.settings(self, name), folder, self.progress, task=task or self.task_for(model),
                objective=objective, groups=groups, callbacks=callbacks, mixed=True,
            )  # fmt: skip
            save_state(model, weights)
            atomic_write_json(note, {**asdict(run), "seconds": time.perf_counter() - started})
        else:
            load_state(model, weights)
        model.eval()
        found: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        self.seconds[name] = found.pop("seconds")
        return found

    def task_for(self, model: nn.Module) -> Task:
        """The model's own task, or of a network in the making that of the study's model."""
        return self.task(model if self.model is None else self.model)

    def judge(self, model: nn.Module, rows: Sequence[Row]) -> dict[str, float]:
        """The task's measures of a model on rows."""
        assert self.origin is not None
        with evaluation_mode(model):
            return self.task_for(model).measure(model, self.origin, rows, TOGETHER, self.progress)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What came of a search; numbers and words here go to search.json and the page.

    Attributes:
        model: float, with a config: a class of transformers, or of :mod:`nybble.models.own`. It becomes a model folder.
        encoding: the architecture, in words that JSON has.
        cost, full: units of the budget, of what was found and of the full network.
        measures: of the found network, by name. front: points of a Pareto front: ``cost``, ``score``, perhaps ``name``.
        score: what the front's scores are, for people.
        compared: rows of one table, what was found and its rivals: by column, words or numbers.
        parts: rows of another, what each part of the network has.
        pictures: by caption, a PNG of the page. files: by name, further files beside the model.
    """

    model: Any
    encoding: Mapping[str, Any]
    cost: int
    full: int
    measures: Mapping[str, float] = field(default_factory=dict)
    front: Sequence[Mapping[str, Any]] = ()
    score: str = ""
    compared: Sequence[Mapping[str, Any]] = ()
    parts: Sequence[Mapping[str, Any]] = ()
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
