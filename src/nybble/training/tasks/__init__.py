"""What a model is trained to do, one task a file: how a SRC becomes rows, rows a batch, outputs a loss and measures.

A task is chosen by what the model is (:func:`task_of`): causal language models read text and instructions, classifiers
records with a label, translators pairs. Other packages add tasks through entry points of the group
``nybble.training.tasks``; theirs are asked first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError, UsageError
from nybble.core.progress import Progress
from nybble.core.registry import Registry
from nybble.data.samples import Origin
from nybble.data.text import Part

Row = Mapping[str, Any]
"""An example, ready to be collated."""
Augment = Callable[[Mapping[str, Tensor], torch.Generator], Mapping[str, Tensor]]
"""A batch changed at random, by numbers drawn from a generator on the CPU."""


class TaskData(Protocol):
    """What a source came to."""

    @property
    def rows(self) -> Sequence[Row]:
        """The examples, in order."""

    @property
    def targets(self) -> int:
        """How many things the loss is a mean of: tokens, records."""

    def manifest(self) -> dict[str, Any]:
        """What stands beside every number from these examples: ``source``, ``sha256``, ``examples`` ..."""


class Task(ABC):
    """One task.

    Attributes:
        summary: one line.
        unit: what ``targets`` counts, for people: ``target tokens``.
        shown: the metric, of those of :meth:`measure`, that a line of progress or a table shows first.
    """

    summary: ClassVar[str]
    unit: ClassVar[str]
    shown: ClassVar[str]

    @abstractmethod
    def claims(self, model: nn.Module) -> bool:
        """Whether it is what this model (which may be on the meta device) does."""

    @abstractmethod
    def check(self, model: nn.Module, name: str, seq_len: int) -> None:
        """Refuse sizes that the model ``name`` has no room for.

        Raises:
            NybbleError: names the setting and the most that fits.
        """

    @abstractmethod
    def load(self, src: str, origin: Origin, model: nn.Module, seq_len: int, part: Part) -> TaskData:
        """Read a SRC.

        Args:
            src: what the user typed.
            origin: the model's place, for its tokenizer or preprocessing.
            model: on the meta device; its config says what fits.
            seq_len: most tokens of an example.
            part: which half of ``builtin``, where the task takes that.

        Raises:
            FileError, DataError: it can't be read, is of another form, or doesn't fit the model.
        """

    def augmentation(self, line: str, rows: Sequence[Row]) -> Augment | None:
        """What changes batches in training, as the settings' ``augment`` says; by default there is nothing that does.

        Raises:
            NybbleError: the line asks for what this task, or examples like ``rows``, don't have.
        """
        if line:
            raise UsageError(f"augment {line!r}: {self.summary} have no augmentation; leave it out.")
        return None

    def classes_of(self, rows: Sequence[Row]) -> list[int]:
        """The class of each example, of tasks whose examples have one each: logits are [examples, classes] there.

        Raises:
            UsageError: they don't.
        """
        raise UsageError(f"a coreset is chosen among examples with a class each, and {self.summary} have none.")

    def length(self, row: Row) -> int:
        """How long an example is: those of about one length share an update. 1 where all are alike."""
        return 1

    @abstractmethod
    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Examples as the model's arguments, ``labels`` among them: with these its output has a ``loss``."""

    def counted(self, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        """Bool, the shape of ``logits`` without its classes: which rows of logits are of something real.

        Padding is not; what the loss of the labels leaves out (a prompt, say) is.
        """
        return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)

    @abstractmethod
    def measure(
        self, model: nn.Module, origin: Origin, rows: Sequence[Row], batch: int, progress: Progress
    ) -> dict[str, float]:
        """Metrics on held-out examples, the model in eval mode; higher or lower is better as the metric's name says."""

    @abstractmethod
    def samples(self, model: nn.Module, origin: Origin, rows: Sequence[Row]) -> list[dict[str, str]]:
        """What the model makes of the first examples: ``prompt``, ``text``, ``target``, each to be read by people."""


TASKS = Registry("nybble.training.tasks", "training task", lambda part: isinstance(part, Task))


def task_of(model: nn.Module, name: str) -> Task:
    """The task that claims a model.

    Raises:
        ModelError: none does; names the class, and the ones that are taken.
    """
    made: dict[str, Task] = TASKS.all()
    own = TASKS.own()
    for key in sorted(made, key=lambda key: key in own):
        if made[key].claims(model):
            return made[key]
    known = "; ".join(f"{key}: {each.summary}" for key, each in made.items())
    raise ModelError(
        f"{name} is a {type(model).__name__}, and no training task is made for that ({known}). Others are trained in a "
        "loop of your own: nybble.load, then nybble.training.prepare.prepare or peft.get_peft_model."
    )
