"""Public tasks (questions, exams, texts to continue) by EleutherAI's lm-evaluation-harness, package ``lm_eval``.

The harness reads the tasks, builds the prompts and counts; models are asked through its own transformers class, so
that a number here is the number there. A task is a name that the harness knows, or a YAML file in a folder of the
user's own; data files that such a YAML names are looked up beside it first, then where the process runs.
Source: Gao et al., github.com/EleutherAI/lm-evaluation-harness, ``docs/new_task_guide.md``.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import random
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nybble.core.errors import DataError, FileError, ModelError, UsageError
from nybble.core.guard import reading
from nybble.core.options import at_least_one
from nybble.core.seeds import preserve_global_rng
from nybble.core.versions import at_least
from nybble.eval._logits import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OLDEST = (0, 4, 12)
"""Of ``lm_eval``: the first whose tasks are loaded apart from a model."""
INSTALL = "pip install 'nybble[lm-eval]'"
_NEAR = 3
RESAMPLES = 1000
"""Bootstrap samples of the standard errors that have no formula."""


@cache
def harness_version() -> str:
    """The installed version; nothing is imported.

    Raises:
        UsageError: the package is missing or too old.
    """
    return at_least(
        "lm-eval",
        OLDEST,
        needs="tasks need EleutherAI's lm-evaluation-harness",
        install=f"{INSTALL} (lm-eval[hf]>={'.'.join(map(str, OLDEST))})",
    )


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Run the harness without its warnings and prints on standard output, and without a trace in random states."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(preserve_global_rng())
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(logging.ERROR)
            stack.callback(logger.setLevel, level)
        yield


@dataclass(frozen=True, kw_only=True)
class Named:
    """Tasks that there are, before their data is read.

    Attributes:
        manager: the harness's, which knows them. names: of tasks, groups and tags. place: folder of the user's own.
    """

    manager: Any
    names: tuple[str, ...]
    place: Path | None


def find_tasks(names: Sequence[str], folder: str | Path | None = None) -> Named:
    """The harness's tasks and groups of these names.

    Args:
        names: of tasks, groups or tags; patterns with ``*`` are taken.
        folder: with YAML files of further tasks, which win over the harness's own. Python that one of these asks for
            (``!function``) is run when it is loaded: a folder of tasks is trusted as a script is.

    Raises:
        UsageError: no names; names that there is no task of, all of them with those that are near; the harness is
            missing or too old. FileError: no such folder.
    """
    harness_version()
    if not names:
        raise UsageError("no task is named; say --tasks NAME[,NAME].")
    place = None if folder is None else Path(folder).resolve()
    if place is not None and not place.is_dir():
        raise FileError(f"there is no folder {folder} to look for tasks in.")
    with _apart(), reading("lm_eval", UsageError):
        from lm_eval.tasks import TaskManager

        manager = None if place is None else TaskManager(include_path=str(place), include_defaults=False)
        if manager is None or not all(manager.match_tasks([name]) for name in names):
            manager = TaskManager(include_path=None if place is None else str(place))  # reads 14,000 files
        found = {name: sorted(manager.match_tasks([name])) for name in names}
        unknown = [name for name, those in found.items() if not those]
        if unknown:
            hints = "".join(_near(name, manager.all_tasks) for name in unknown)
            where = "lm_eval has no task" if place is None else f"neither {place} nor lm_eval has a task"
            said = ", ".join(map(repr, unknown))
            raise UsageError(f"{where} {said}.{hints} Tasks of your own: YAML files in --task-dir DIR.")
    known = tuple(dict.fromkeys(name for those in found.values() for name in those))
    return Named(manager=manager, names=known, place=place)


def _near(name: str, known: Iterable[str]) -> str:
    """Names of tasks that a misspelt one may mean."""
    close = difflib.get_close_matches(name.lower(), sorted(known), n=_NEAR, cutoff=0.6)
    if not close:
        return ""
    *others, last = map(repr, close)
    return f" By {name!r}, did you mean {', '.join(others)}{' or ' if others else ''}{last}?"


def load_tasks(named: Named) -> dict[str, Any]:
    """Tasks and groups with their data.

    Returns:
        As the harness's ``TaskManager.load``: ``tasks`` and ``groups`` by name, ``group_map``.

    Raises:
        DataError: a task's YAML or data can't be read; names the task.
    """
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with _apart(), reading("lm_eval", UsageError):
        for name in named.names:
            for kind, items in _load(named.manager, name, named.place).items():
                found[kind] |= items
    return found


def _load(manager: Any, name: str, place: Path | None) -> dict[str, Any]:
    """A task or group, or all of a tag; its data files are looked up in each folder until they are there."""
    own, folders = manager.task_index[name].yaml_path, [Path.cwd()]
    if place is not None and (own is None or place in Path(own).parents):
        folders = [place if own is None else Path(own).parent, place, *folders]
    for folder in (tried := list(dict.fromkeys(folders))):
        try:
            with reading(f"task {name!r}", DataError), contextlib.chdir(folder):
                loaded: dict[str, Any] = manager.load([name])
            break
        except DataError as error:
            if folder == tried[-1] or not isinstance(error.__cause__, FileNotFoundError):
                raise
    return loaded


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Any],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    seq_len: int | None = None,
) -> dict[str, Any]:
    """Ask a model all questions of some tasks.

    The prompts of a batch are padded on the left to generate and on the right to judge given answers, where no real
    token sees the padding; see :func:`nybble.nn.activation.measured_over_tokens` for the activations that do.
    Seeds are the harness's own (few-shot examples are drawn by 1234); the caller's random state stays as it is.

    Args:
        model: generates text, decoder or encoder-decoder; in eval mode afterwards as it was before.
        tokenizer: its own; gets a padding token if it has none.
        tasks: from :func:`load_tasks`.
        batch_size: prompts a forward takes.
        limit: at most so many questions of each task, the first ones.
        num_fewshot: solved examples in front of a question; None: as each task says.
        chat: put the prompts into the tokenizer's chat template.
        seq_len: most tokens a prompt and its answer take; None: as the model's config says.

    Returns:
        ``metrics``: ``TASK/METRIC`` -> value, standard errors as ``TASK/METRIC_stderr``, behind another filter than
        the task's only one ``TASK/METRIC,FILTER``; ``tasks``: name -> ``version``, ``samples``, ``num_fewshot``,
        ``sha256`` of the questions asked.

    Raises:
        UsageError: a number below 1 (below 0 of examples). ModelError: the model can't run, or an answer is NaN.
    """
    at_least_one(batch_size=batch_size, limit=limit, seq_len=seq_len)
    if num_fewshot is not None and num_fewshot < 0:
        raise UsageError(f"num_fewshot is {num_fewshot}; it must be 0 or more.")
    if chat and not tokenizer.chat_template:
        raise UsageError("the tokenizer has no chat template; leave out --chat.")
    with _apart(), evaluating(model), reading("lm_eval, on this model,", ModelError):
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=seq_len)
        _seed(tasks["tasks"].values(), num_fewshot)
        found = evaluate(
            asked, dict(tasks), limit=limit, bootstrap_iters=RESAMPLES, apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )  # fmt: skip
    return {"metrics": _metrics(found), "tasks": _manifest(found)}


def _seed(tasks: Iterable[Any], num_fewshot: int | None) -> None:
    """What the harness's ``simple_evaluate`` does before, in this process for good; it lists all packages beside."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in tasks:
        stated = task.get_config("num_fewshot")
        if stated is None or (num_fewshot is not None and stated != 0):  # a task that says 0 has no examples
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """Every number of every task and group, under one name."""
    numbers: dict[str, float] = {}
    for task, metrics in {**found["results"], **(found.get("groups") or {})}.items():
        for key, value in metrics.items():
            name, _, rule = key.partition(",")
            if rule and isinstance(value, int | float):  # "N/A" where there is no standard error
                if value != value and not name.endswith("_stderr"):
                    raise ModelError(f"{task}: {name} came out as NaN: look for NaN weights, or run in bfloat16.")
                numbers[f"{task}/{name}" if rule == "none" else f"{task}/{key}"] = float(value)
    return numbers


def _manifest(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What was asked: of each task its version, how many questions, and a digest of them."""
    said: dict[str, dict[str, Any]] = {}
    for task, samples in found["samples"].items():
        asked = [json.dumps(sample["doc"], sort_keys=True, default=str) for sample in samples]
        said[task] = {
            "version": found["versions"].get(task),
            "samples": len({sample["doc_id"] for sample in samples}),
            "num_fewshot": found["n-shot"].get(task),
            "sha256": hashlib.sha256("\n".join(dict.fromkeys(asked)).encode()).hexdigest(),
        }
    return said
