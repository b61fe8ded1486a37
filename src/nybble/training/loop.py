"""The loop: transformers' Trainer, made safe to kill.

It also learns of an order of examples that can be gone on with, of losses that are no number, whom to tell, and of
other processes: each has a Trainer that thinks itself alone, and they share forwards (:mod:`nybble.training.sharing`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from nybble.core import ranks
from nybble.core.errors import FileError, LearningError, NybbleError
from nybble.core.files import atomic_write_json, free_bytes
from nybble.core.guard import reading
from nybble.core.progress import Progress, Silent
from nybble.core.progress import task as said
from nybble.core.seeds import derive_seed, generator
from nybble.training.callbacks import Acting
from nybble.training.compiling import compiled_blocks
from nybble.training.coreset import Coreset, CoresetOptions
from nybble.training.memory import keeping
from nybble.training.objective import Objective
from nybble.training.optimizers import make_optimizer, state_bytes
from nybble.training.settings import TrainSettings
from nybble.training.sharing import SharedForwards, check_alone, in_turn
from nybble.training.state import load_state, save_state
from nybble.training.tasks import TASKS, Augment, Row, Task

STATE, MEMORY, WEIGHTS = "trainer_state.json", "memory.json", "model.safetensors"


@dataclass
class Run:
    """What a run came to.

    Attributes:
        steps: updates. curve: (update, mean loss of its target tokens).
        losses: by name, where several are added: each one's mean in the updates of ``curve``, unweighted.
        watched: numbers of each callback in the updates of ``curve``.
        memory: bytes of ``gradients``, ``optimizer states``, and ``kept for backward`` (of one forward); on a GPU also
            ``peak``, by torch's allocator.
    """

    steps: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    watched: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)


def train(
    model: nn.Module,
    rows: Sequence[Row],
    settings: TrainSettings,
    folder: Path,
    progress: Progress,
    *,
    task: Task | None = None,
    objective: Objective | None = None,
    groups: Sequence[Mapping[str, Any]] | None = None,
    callbacks: Mapping[str, Acting] | None = None,
    mixed: bool = False,
    coreset: CoresetOptions | None = None,
    teacher: nn.Module | None = None,
) -> Run:
    """Train what wants gradients in ``model``.

    Args:
        model: on the device it is to train on.
        rows: examples of the task.
        settings: sizes, rates, seed; ``resume`` goes on from the last whole checkpoint in ``folder``, if there is one.
        folder: for ``checkpoints``, ``memory.json``, and ``logs`` for TensorBoard where that is installed.
        progress: told after each update.
        task: left out: causal language models.
        objective: what is minimised; left out: the loss that the model has of the labels.
        groups: of parameters, for the optimizer; left out: one of all that want gradients.
        callbacks: look at the weights at every update; by name.
        mixed: weights are float32, and multiplied in the settings' dtype.
        coreset: which part of the rows is trained on; left out: all.
        teacher: the float network that scores of a coreset compare with.

    Raises:
        LearningError: a loss that is no number; names the update. FileError: a checkpoint can't be written or read.
    """
    checkpoints = folder / "checkpoints"
    last = ranks.lead_alone(lambda: last_checkpoint(checkpoints))
    progress = progress if ranks.leads() else Silent()
    task = task or TASKS.get("language")
    optimizer = make_optimizer(settings.optimizer, model, settings.lr, groups)
    check_alone(model)
    kept = None
    if coreset is not None:
        kept = Coreset(
            coreset, task, rows, model=model, teacher=teacher, epochs=_epochs(settings, coreset, task.classes_of(rows)),
            seed=settings.seed, folder=checkpoints,
        )  # fmt: skip
    again = settings.checkpointing and _forgets(model)
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    blocks = compiled_blocks(model) if settings.compile else nullcontext()
    with _quiet(), _alone(), _own_forward(model), blocks:
        trainer = _Loop(
            model=model,
            args=_arguments(replace(settings, checkpointing=again), checkpoints, mixed=mixed),
            train_dataset=rows,
            data_collator=task.collate,
            optimizers=(optimizer, None),
            settings=settings,
            notes=folder / MEMORY,
            lengths=[task.length(row) for row in rows],
            objective=objective,
            augment=task.augmentation(settings.augment, rows),
            acting=callbacks or {},
            coreset=kept,
        )
        _listen(trainer, folder / "logs", last)
        with said(progress, trainer.total, "training"):
            trainer.add_callback(_Told(progress))
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
    for name, p in model.named_parameters():
        if p.requires_grad and not p.isfinite().all():  # by the last update, which no loss has seen
            raise LearningError(f"{name} holds NaN or Inf behind the last update; use a smaller lr, or dtype float32.")
    memory = {**trainer.memory, "optimizer states": state_bytes(optimizer)}
    if settings.device == "cuda":
        memory["peak"] = torch.cuda.max_memory_allocated()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    curve = [(int(entry["step"]), float(entry["loss"])) for entry in logged]
    losses = {name: [float(entry[f"loss_{name}"]) for entry in logged] for name in trainer.losses}
    watched = {
        name: {key: [float(entry[f"{name}_{key}"]) for entry in logged] for key in acting.newest()}
        for name, acting in (callbacks or {}).items()
    }
    return Run(
        steps=trainer.state.global_step, curve=curve, losses=losses, watched=watched, memory=ranks.lead_says(memory)
    )


def _epochs(settings: TrainSettings, coreset: CoresetOptions, labels: list[int]) -> int:
    """How many the run has, over the examples that are kept."""
    updates = -(-sum(coreset.sizes(labels).values()) // (settings.batch * settings.accumulate))
    return settings.epochs if settings.steps is None else -(-settings.steps // updates)


def _forgets(model: Any) -> bool:
    """Whether a network has blocks whose activations it can compute again."""
    return bool(getattr(model, "supports_gradient_checkpointing", True))


def _listen(trainer: Trainer, logs: Path, last: Path | None) -> None:
    """Logs for TensorBoard, of one process, in place of lines on standard output."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if ranks.leads() and (writer := _tensorboard(logs, 0 if last is None else _number(last))) is not None:
        trainer.add_callback(writer)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; what a kill left of others is removed. The Trainer writes its state last."""
    for path in sorted(folder.glob("checkpoint-*"), key=_number, reverse=True):
        try:
            json.loads((path / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(path)
        else:
            return path
    return None


def _number(checkpoint: Path) -> int:
    """The update behind which it was made."""
    return int(checkpoint.name.rpartition("-")[2])


SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def _arguments(settings: TrainSettings, folder: Path, mixed: bool = False) -> TrainingArguments:
    here = torch.cuda.current_device() if settings.device == "cuda" else None
    word = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"  # before 5.24
    again: dict[str, Any] = {f"{word}_checkpointing": settings.checkpointing}
    again[f"{word}_checkpointing_kwargs"] = {"use_reentrant": False}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        warmup_steps=min(settings.warmup, math.nextafter(1.0, 0.0)),  # from 1 on it would be a number of updates
        max_grad_norm=settings.clip,
        **again,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=2,
        seed=derive_seed(settings.seed, "train") % 2**32,
        use_cpu=settings.device == "cpu",
        bf16=mixed and settings.dtype == "bfloat16",
        dataloader_pin_memory=settings.device != "cpu",
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # otherwise it copies the model to every GPU that it sees
    if here is not None:  # it has taken the first GPU, whichever is this rank's
        torch.cuda.set_device(here)
        arguments.__dict__["_setup_devices"] = torch.device("cuda", here)
    return arguments


class _Loop(Trainer):
    """The Trainer with examples of about one length in an update, and a check of each loss.

    Memory is what the very first forward took; a run that is gone on with finds it in ``notes``.
    """

    def __init__(
        self, *, settings: TrainSettings, notes: Path, lengths: list[int], objective: Objective | None,
        augment: Augment | None, acting: Mapping[str, Acting], coreset: Coreset | None, **given: Any,
    ) -> None:  # fmt: skip
        super().__init__(**given)
        self.augment, self.acting, self.coreset = augment, acting, coreset
        self.add_callback(_Acts(acting, lambda: self.progress))
        self.settings, self.notes, self.lengths = settings, notes, lengths
        self.objective: Objective | None = objective
        self.losses = [] if objective is None or len(objective.losses) < 2 else [each[0] for each in objective.losses]
        self._heard: list[Tensor] = []
        if objective is not None:
            self.model_accepts_loss_kwargs = False  # a mean of each forward: the Trainer divides by their number
        learns = [p for p in given["model"].parameters() if p.requires_grad]
        self.forwards, self.shared = 0, SharedForwards(learns)
        known = notes.exists() and settings.resume
        self.memory: dict[str, int] = json.loads(notes.read_text(encoding="utf-8")) if known else {}

    @property
    def total(self) -> int:
        """Updates of the whole run."""
        per_epoch = -(-len(self.get_train_dataloader()) // self.settings.accumulate)
        return self.settings.steps or self.settings.epochs * per_epoch

    @property
    def progress(self) -> float:
        """Of the whole run, 0 to 1."""
        return self.state.global_step / max(1, self.total - 1)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return _ByLength(self.lengths, self.settings, self.coreset)

    def compute_loss(self, model: nn.Module, inputs: Any, *given: Any, **more: Any) -> Any:
        if self.objective is None:
            return super().compute_loss(model, inputs, *given, **more)
        loss = self.objective(model, inputs, self.progress)
        if self.losses:
            self._heard.append(torch.stack([self.objective.last[name].float() for name in self.losses]))
        return loss

    def log(self, logs: dict[str, float], *given: Any, **more: Any) -> None:
        """With each of several losses, and what callbacks have to say: a checkpoint keeps them with the rest."""
        if "loss" in logs and self.losses:
            means = torch.stack(in_turn(self._heard, self.args.device)).mean(0).tolist()
            logs = {**logs, **{f"loss_{name}": mean for name, mean in zip(self.losses, means, strict=True)}}
            self._heard = []
        if "loss" in logs:
            found = {f"{name}_{key}": v for name, acting in self.acting.items() for key, v in acting.newest().items()}
            logs = {**logs, **found}
        super().log(logs, *given, **more)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        number, last = self.forwards, self.accelerator.sync_gradients
        self.forwards = 0 if last else number + 1

        def forward() -> Tensor:
            return self._forward(number, model, inputs, num_items_in_batch)

        return forward() if ranks.size() == 1 else self.shared.step(forward, last)

    def _forward(self, number: int, model: nn.Module, inputs: Any, items: Any) -> Tensor:
        """Forward ``number`` of an update, with random numbers of its own: whoever computes it draws the same."""
        place = (str(self.state.global_step), str(number))
        torch.manual_seed(derive_seed(self.settings.seed, "train", "forward", *place))
        torch.clear_autocast_cache()  # within a caller's autocast the Trainer's would keep the last update's weights
        if self.augment is not None:
            inputs = self.augment(inputs, generator(self.settings.seed, "train", "augment", *place))
        for name, acting in self.acting.items():
            acting.before_forward(self.progress, generator(self.settings.seed, "train", name, *place))
        first: AbstractContextManager[dict[int, int]] = nullcontext({}) if self.memory else keeping(model)
        with first as kept:
            loss: Tensor = super().training_step(model, inputs, items)
        if not loss.isfinite():
            raise LearningError(
                f"the loss of update {self.state.global_step + 1} is {loss.item()}; use a smaller lr, or dtype float32."
            )
        for acting in self.acting.values():  # the Trainer has divided by the forwards of an update
            acting.after_forward(loss.detach() * self.settings.accumulate)
        if not self.memory:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            self.memory["gradients"] = sum(g.numel() * g.element_size() for g in gradients)
            self.memory["kept for backward"] = sum(kept.values())
            if ranks.leads():
                atomic_write_json(self.notes, self.memory)
        return loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Adapters as PEFT's; of everything else all tensors, as they are, under their own names."""
        made: Any = self.model
        if hasattr(made, "peft_config"):
            return super()._save(output_dir, state_dict)
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        return save_state(made, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        made: Any = self.model if model is None else model
        with _whole(resume_from_checkpoint):
            if hasattr(made, "peft_config"):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                load_state(made, Path(resume_from_checkpoint) / WEIGHTS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _whole(checkpoint, "optimizer.pt", "scheduler.pt"):  # where one is missing, it would begin with new ones
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _whole(checkpoint):
            super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not ranks.leads():
            return
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except NybbleError:
            raise
        except Exception as error:  # torch and safetensors each have their own for a disk that is full
            shutil.rmtree(folder, ignore_errors=True)
            text = " ".join(str(error).split())[:200]
            raise FileError(
                f"{folder} can't be written ({text}); {free_bytes(folder):,} bytes are free there. Free some space and "
                "go on with --resume."
            ) from error


@contextmanager
def _whole(checkpoint: str | None, *names: str) -> Iterator[None]:
    """Say of a checkpoint that lacks files, or can't be read inside, which it is and how to go on without it."""
    way = f"Remove {checkpoint}: --resume goes on from the checkpoint before it, or from the beginning."
    lacking = [name for name in names if checkpoint is not None and not (Path(checkpoint) / name).is_file()]
    if lacking:
        raise FileError(f"{checkpoint} lacks {lacking[0]}. {way}")
    try:
        with reading(checkpoint):
            yield
    except FileError as error:
        if isinstance(error.__cause__, torch.OutOfMemoryError):
            raise error.__cause__ from None
        raise FileError(f"{error} {way}") from error


class _ByLength(Sampler[int]):
    """Examples of about one length in an update, the longest first; each epoch's order is its own and known ahead."""

    def __init__(self, lengths: list[int], settings: TrainSettings, coreset: Coreset | None = None) -> None:
        self.lengths, self.together, self.seed = lengths, settings.batch * settings.accumulate, settings.seed
        self.epoch, self.coreset = 0, coreset

    def __len__(self) -> int:
        return len(self.lengths) if self.coreset is None else self.coreset.size

    def __iter__(self) -> Iterator[int]:
        order = generator(self.seed, "train", "order", str(self.epoch))
        grouped: Any = get_length_grouped_indices
        if self.coreset is None:
            return iter(grouped(self.lengths, self.together, generator=order))
        kept = self.coreset.of_epoch(self.epoch)
        lengths = [self.lengths[at] for at in kept]
        return iter(kept[i] for i in grouped(lengths, self.together, generator=order))

    def set_epoch(self, epoch: int) -> None:
        """Called by whoever counts epochs."""
        self.epoch = epoch


class _Acts(TrainerCallback):
    """What looks at the weights, around each of the optimizer's steps."""

    def __init__(self, acting: Mapping[str, Acting], progress: Callable[[], float]) -> None:
        self.acting, self.progress = acting, progress

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        for acting in self.acting.values():
            acting.before_update(self.progress())

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        for acting in self.acting.values():
            acting.after_update(self.progress())


class _Told(TrainerCallback):
    """Progress, with the newest loss; what an earlier run did counts at once."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.progress.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.progress.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        if logs and "loss" in logs:
            self.progress.advance(0, f"loss {float(logs['loss']):.4f}")


def _tensorboard(folder: Path, done: int) -> Any:
    """A callback that writes logs for TensorBoard, or None without it.

    What a killed run had logged behind its last checkpoint, update ``done``, is logged again: TensorBoard forgets it.
    """
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    callback: Any = TensorBoardCallback
    return callback(SummaryWriter(log_dir=str(folder), purge_step=done + 1 if done else None))


_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@contextmanager
def _alone() -> Iterator[None]:
    """Without what torchrun says of other processes: accelerate would average gradients with them."""
    kept = {name: os.environ.pop(name) for name in _LAUNCHED if name in os.environ}
    try:
        yield
    finally:
        os.environ |= kept


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Without accelerate's around it afterwards: whatever is measured then would be rounded to its bfloat16, too."""
    before = model.__dict__.get("forward")
    try:
        yield
    finally:
        for name in ("forward", "_original_forward"):
            model.__dict__.pop(name, None)
        if before is not None:
            model.__dict__["forward"] = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the Trainer's lines of advice: the progress is told by us."""
    loggers = [logging.getLogger(name) for name in ("transformers", "accelerate")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
