"""A request of ``nybble train``, and everything that can be wrong with it before weights are read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nybble.checkpoint.marked import MANIFEST, is_others, is_quantized
from nybble.core.dtypes import float_dtype
from nybble.core.errors import FileError, ModelError, NybbleError, UsageError
from nybble.core.options import build
from nybble.core.versions import versions
from nybble.data.kinds import data_kind
from nybble.data.samples import Origin
from nybble.data.text import check_source
from nybble.models.adapter import reads_of
from nybble.models.build.config_file import read_json
from nybble.models.sources.open import open_source
from nybble.nn.linear import QuantLinear
from nybble.pipelines.load import described_with_origin
from nybble.pipelines.request import changed_scheme
from nybble.pipelines.targets import check_form_name
from nybble.quantizer import Quantizer
from nybble.scheme import Scheme, parse_scheme
from nybble.training.generated import Generation, own_texts
from nybble.training.methods import METHODS, AdapterMethod, Method
from nybble.training.objective import make_losses, needs_teacher
from nybble.training.optimizers import make_optimizer
from nybble.training.recipe import TrainingRecipe
from nybble.training.settings import TrainSettings
from nybble.training.tasks import TASKS, Task, TaskData, task_of
from nybble.training.tasks.language import Language

MOST_BITS = 8


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a person asked for.

    Attributes:
        recipe: what to do. model: what to. data: examples.
        changes: of the scheme, as :func:`nybble.pipelines.request.build_recipe` takes them.
        packed: train beside the blocks of a GGUF file as they are.
        options: of the method, beside the recipe's. adapter: an earlier result to go on from.
        judged_on: held-out examples. teacher: the float network; None: the model. merge, form: of the result.
    """

    recipe: TrainingRecipe
    model: str
    data: str
    changes: Mapping[str, Any]
    packed: bool
    options: Mapping[str, Any]
    adapter: Path | None
    judged_on: str | None
    teacher: str | None
    merge: bool
    form: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request that was checked.

    Attributes:
        asked: it. method: what does it. options: the method's. scheme: what is quantized.
        line: of the base that is packed first; None: nothing is.
        task: what the model does. origin: its place. dtype: that the model has.
        given: to train on; None: texts of the model's own (``own``), which have to be made first. judged: held out.
    """

    asked: Asked
    method: Method
    options: Any
    scheme: Scheme
    line: str | None
    settings: TrainSettings
    task: Task
    origin: Origin
    given: TaskData | None
    own: Generation | None
    judged: TaskData | None
    dtype: torch.dtype

    @property
    def examples(self) -> TaskData:
        """To train on; of the model's own texts behind :meth:`with_texts`."""
        assert self.given is not None
        return self.given

    def with_texts(self, file: Path) -> Job:
        """The job with texts of the model's own that are in a file."""
        described, _ = described_with_origin(self.model)
        found = self.task.load(str(file), self.origin, described, self.settings.seq_len, "calibration")
        return replace(self, given=found)

    @property
    def model(self) -> str:
        """What to train."""
        return self.asked.model

    @property
    def tokenizer(self) -> Any:
        """Of the model; None where it has none."""
        described, _ = described_with_origin(self.model)
        return data_kind(reads_of(described)).tokenizer(self.origin)

    @property
    def teacher(self) -> str | None:
        """The float network, where a loss, or the choice of examples, compares with it."""
        coreset = self.method.coreset(self.options)
        if not self.taught and not (coreset is not None and coreset.taught):
            return None
        return self.asked.teacher or self.model

    @property
    def taught(self) -> bool:
        """Whether a loss compares with the float network."""
        losses = self.method.losses(self.options)
        return bool(losses) and needs_teacher(make_losses(losses))

    @property
    def known(self) -> list[Quantizer]:
        """Quantizers that the packed weights may be of: the scheme's, and those in a folder's record."""
        lines = [str(rule.weights) for rule in self.scheme.rules if rule.weights is not None]
        record = Path(self.model) / MANIFEST
        if record.is_file():
            lines += [row["weights"] for row in read_json(record).get("layers", []) if row.get("weights")]
        found: dict[str, Quantizer] = {}
        for line in lines:
            with suppress(NybbleError):  # what a tensor of another kind says of itself
                found[line] = Quantizer(line.partition(" + rank ")[0])
        return list(found.values())

    def request(self) -> dict[str, Any]:
        """All that decides the result."""
        asked = self.asked
        found = {
            "method": asked.recipe.name,
            "options": _plain(self.options),
            "model": self.model,
            "weights": self.line,
            "packed": asked.packed,
            "adapter": None if asked.adapter is None else str(asked.adapter),
            "settings": self.settings.request(),
            "data": self.examples.manifest() if self.own is None else {"source": self.asked.data, **_plain(self.own)},
            "eval": None if self.judged is None else self.judged.manifest(),
            "versions": versions(),
        }
        if not isinstance(self.method, AdapterMethod):
            found |= {"scheme": self.scheme.to_dict(), "teacher": self.teacher}
        return found


def _plain(options: Any) -> dict[str, Any]:
    """As JSON gives it back."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(options)))
    return found


def checked(asked: Asked, settings: TrainSettings) -> Job:
    """Everything that can be wrong, before weights are read or anything is written.

    Raises:
        NybbleError: names what is wrong, and a way out.
    """
    method: Method = METHODS.get(asked.recipe.method)
    method.needed()
    options = build(
        method.options_type, {**asked.recipe.options, **asked.options}, f"recipe {asked.recipe.name!r}"
    )  # fmt: skip
    check_form_name(asked.form)
    make_optimizer(settings.optimizer, nn.Linear(64, 64), settings.lr)  # all that can be wrong with its line
    base = None
    if isinstance(method, AdapterMethod):
        base = None if asked.adapter is None else method.base_of(asked.adapter)
    elif asked.adapter is not None:
        raise UsageError(f"recipe {asked.recipe.name} trains no adapter; leave --adapter out.")
    elif asked.merge:
        raise UsageError(f"recipe {asked.recipe.name} gives one model anyhow; leave --merge out.")
    own = own_texts(asked.data, settings.seq_len, settings.seed)
    for src in (None if own is not None else asked.data, asked.judged_on):
        check_source("builtin" if src is None else src)
    described, origin = described_with_origin(asked.model)
    task = task_of(described, asked.model)
    _check_task(asked, method, task, described)
    task.check(described, asked.model, settings.seq_len)
    scheme, line = changed_scheme(asked.recipe.scheme, asked.changes), None
    if method.packs:
        line = _line(asked, scheme)
    else:
        _check_float(asked)
    method.check(options, scheme)
    method.check_asked(asked.options, options, scheme)
    _check_teacher(asked, method, options, line)
    if base is not None and line is not None:
        raise UsageError(
            f"{asked.adapter} was trained on a packed base, and {asked.model} would be packed anew; give that base as "
            f"MODEL: {base}."
        )
    if asked.teacher is not None:
        _check_fits(asked.teacher, task, described, origin)
    judged = None
    if asked.judged_on is not None:
        judged = task.load(asked.judged_on, origin, described, settings.seq_len, "evaluation")
    if own is not None and not isinstance(task, Language):
        raise UsageError(f"{asked.model} makes no texts of its own; give --data SRC.")
    given = None if own is not None else task.load(asked.data, origin, described, settings.seq_len, "calibration")
    task.augmentation(settings.augment, () if given is None else given.rows)  # all that can be wrong with its line
    coreset = method.coreset(options)
    if coreset is not None:
        coreset.sizes(task.classes_of(() if given is None else given.rows))
    return Job(
        asked=asked, method=method, options=options, scheme=scheme, line=line, settings=settings, task=task,
        origin=origin, given=given, own=own, judged=judged, dtype=_dtype(origin.config),
    )  # fmt: skip


def _check_task(asked: Asked, method: Method, task: Task, model: nn.Module) -> None:
    if method.tasks and TASKS.key_of(task) not in method.tasks:
        taken = "; ".join(TASKS.get(name).summary for name in method.tasks)
        raise ModelError(
            f"{asked.model} is a {type(model).__name__}, and recipe {asked.recipe.name} trains {taken}. Others take "
            "adapters in a loop of your own: nybble.load, then peft.get_peft_model."
        )


def _dtype(config: Any) -> torch.dtype:
    """What the model's files are in, as its config says; bfloat16 where it doesn't."""
    given = getattr(config, "dtype", None)
    return torch.bfloat16 if given is None else given if isinstance(given, torch.dtype) else float_dtype(given, "dtype")


def _check_teacher(asked: Asked, method: Method, options: Any, line: str | None) -> None:
    """Of a packed model nobody can say what the float one was; and one that no loss compares with is no teacher."""
    losses = method.losses(options)
    taught = bool(losses) and needs_teacher(make_losses(losses))
    if asked.teacher is not None and not taught:
        why = f": its losses ({', '.join(losses)}) compare with none; name logits, or" if losses else ";"
        raise UsageError(f"recipe {asked.recipe.name} has no teacher{why} leave --teacher out.")
    if method.packs and line is None and asked.teacher is None and taught:
        raise UsageError(
            f"{asked.model} is packed, and recipe {asked.recipe.name} compares with the float model; give it: "
            "--teacher MODEL."
        )


def _check_fits(teacher: str, task: Task, student: Any, origin: Origin) -> None:
    """A teacher does what the model does, and speaks of the same words or classes; its size is its own.

    Raises:
        UsageError: it doesn't.
    """
    found, its_origin = described_with_origin(teacher)
    model: Any = found
    if not task.claims(model):
        raise UsageError(f"--teacher {teacher} is a {type(model).__name__}, which does something else than the model.")
    (said, its), (_, own) = _said(model), _said(student)
    if its != own:
        raise UsageError(f"--teacher {teacher} has {its:,} {said}, and the model {own:,}; give one of the same.")
    kind = data_kind(reads_of(student))
    with suppress(FileError):  # one of the folders holds no tokenizer
        theirs, ours = (kind.tokenizer(place) for place in (its_origin, origin))
        if theirs is not None and ours is not None and theirs.get_vocab() != ours.get_vocab():
            raise UsageError(f"--teacher {teacher} has another vocabulary than the model; give one of the same.")


def _said(model: Any) -> tuple[str, int]:
    """What logits are of, and how many."""
    if model.get_output_embeddings() is None:
        return "classes", int(getattr(model.config, "num_labels", 0))
    return "tokens", int(model.config.get_text_config().vocab_size)


def _check_float(asked: Asked) -> None:
    model = asked.model
    if asked.packed:
        raise UsageError(f"recipe {asked.recipe.name} trains float weights, and no packed blocks; leave --packed out.")
    if is_quantized(Path(model)) or is_others(Path(model)):
        raise UsageError(f"{model} is quantized already; give the float model, whose weights are to be trained.")


def _line(asked: Asked, scheme: Scheme) -> str | None:
    """The line to pack the base in; None for a base that is packed already."""
    model, changed = asked.model, any(value is not None for value in asked.changes.values())
    if asked.packed and (Path(model).is_dir() or not open_source(model).packed_names()):
        raise UsageError(f"--packed is for GGUF files with packed blocks, which {model} is not; leave it out.")
    if asked.packed or is_quantized(Path(model)) or is_others(Path(model)):
        if changed:
            raise UsageError(f"{model} is packed already, and would be trained on as it is; leave --weights out.")
        return None
    for name in asked.changes:
        if name != "weights" and asked.changes[name]:
            raise UsageError(f"recipe {asked.recipe.name} packs weights alone; leave --{name} out.")
    weights = scheme.rules[0].weights
    if weights is None:
        raise UsageError(f"recipe {asked.recipe.name} packs weights; give a quantizer line of up to {MOST_BITS} bits.")
    line = str(asked.changes.get("weights") or weights)
    if scheme.to_dict() != parse_scheme({"weights": line}).to_dict():
        raise UsageError(
            f"recipe {asked.recipe.name} packs the weights of all linear layers in one line, and its scheme says more. "
            "Pack first: nybble quantize MODEL BASE --scheme FILE; and train on BASE."
        )
    bits = Quantizer(line).format.bits
    if bits > MOST_BITS:
        raise UsageError(f"weights {line!r} have {bits} bits; a packed base has {MOST_BITS} or fewer.")
    return line


def space(job: Job) -> int:
    """Bytes that the run may write: the base (twice, merged), three checkpoints with float32 states, the result."""
    described, _ = described_with_origin(job.model)
    layers: list[Any] = [m for m in described.modules() if isinstance(m, nn.Linear | QuantLinear)]
    shapes = [(m.out_features, m.in_features) for m in layers]
    linear, every = sum(map(math.prod, shapes)), sum(p.numel() for p in described.parameters())
    if not job.method.packs:
        return every * (3 * 12 + 4)
    bits = 0 if job.line is None else Quantizer(job.line).format.bits + 1  # and scales
    base = 0 if job.line is None else linear * bits // 8 + 2 * max(0, every - linear)
    trained = 4 * getattr(job.options, "rank", 0) * sum(map(sum, shapes))
    return base * (2 if job.asked.merge else 1) + 10 * trained
