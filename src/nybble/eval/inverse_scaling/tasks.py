"""The eleven tasks of the Inverse Scaling Prize by name.

The data (github inverse-scaling/prize, CC BY 4.0, with canaries) isn't in this package: put its files into a folder, as
NAME.jsonl or NAME.csv. Without them a look-alike stands in where one can be made, and says so. Published numbers of
rows are of arXiv 2306.09479; files on hubs are older and smaller for two tasks, so each result keeps its file's hash.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nybble.core.errors import FileError, UsageError, did_you_mean
from nybble.eval.inverse_scaling.examples import Questions, questions, read_questions
from nybble.eval.inverse_scaling.lookalikes import LOOKALIKES


@dataclass(frozen=True, kw_only=True)
class Task:
    """What was published of a task.

    Attributes:
        name: as the files are called, with hyphens. title: of the paper. cause: why larger models do worse, by the
            paper's grouping. metric: that the prize judged by. rows: counts of the published files, the paper's first.
    """

    name: str
    title: str
    cause: str
    metric: str
    rows: tuple[int, ...]


PRIOR, IMITATION = "strong prior", "unwanted imitation"
DISTRACTOR, FEW_SHOT = "distractor task", "spurious few-shot"
TASKS = {
    task.name: task
    for task in (
        Task(name="resisting-correction", title="Resisting Correction", cause=PRIOR, metric="loss", rows=(7344, 300)),
        Task(name="memo-trap", title="Memo Trap", cause=PRIOR, metric="loss", rows=(936,)),
        Task(name="redefine", title="Redefine", cause=PRIOR, metric="loss", rows=(1244, 900)),
        Task(name="prompt-injection", title="Prompt Injection", cause=PRIOR, metric="sequence_prob", rows=()),
        Task(name="modus-tollens", title="Modus Tollens", cause=IMITATION, metric="loss", rows=(1236,)),
        Task(name="pattern-matching-suppression", title="Pattern Matching Suppression", cause=DISTRACTOR, metric="loss",
             rows=(1428,)),
        Task(name="neqa", title="NeQA", cause=DISTRACTOR, metric="loss", rows=(300,)),
        Task(name="sig-figs", title="Sig Figs", cause=DISTRACTOR, metric="loss", rows=(20897,)),
        Task(name="into-the-unknown", title="Into the Unknown", cause=DISTRACTOR, metric="loss", rows=(1824,)),
        Task(name="hindsight-neglect", title="Hindsight Neglect", cause=FEW_SHOT, metric="loss", rows=(315,)),
        Task(name="repetitive-algebra", title="Repetitive Algebra", cause=FEW_SHOT, metric="loss", rows=(1000,)),
    )
}  # fmt: skip
ALIASES = {
    "quote-repetition": "resisting-correction", "redefine-math": "redefine",
    "pattern-match-suppression": "pattern-matching-suppression", "hindsight-neglect-10shot": "hindsight-neglect",
}  # fmt: skip
LOOKALIKE = "look-alike made here"


def find_questions(name: str, folder: str | Path | None = None, rows: int = 300, seed: int = 0) -> Questions:
    """A task's questions: a file of one's own, the published file in ``folder``, or else a look-alike.

    Args:
        name: a task of :data:`TASKS`, or a ``.csv`` or ``.jsonl`` file.
        folder: with the prize's files.
        rows: of a look-alike.
        seed: of a look-alike.

    Raises:
        UsageError: no such task; or one that has no look-alike, and no file. DataError: a file that can't be read.
        FileError: there is no such folder.
    """
    if Path(name).suffix in (".csv", ".jsonl"):
        return read_questions(name)
    task = TASKS.get(ALIASES.get(plain := name.strip().lower().replace("_", "-"), plain))
    if task is None:
        raise UsageError(
            f"unknown inverse-scaling task {name!r}.{did_you_mean(plain, TASKS)} A file of your own ends in .csv or "
            ".jsonl."
        )
    if folder is not None and not Path(folder).is_dir():
        raise FileError(f"there is no folder {folder}; without --task-dir questions that were made here are asked.")
    if folder is not None and (found := _published(task, Path(folder))):
        return read_questions(found, task.name)
    if task.name not in LOOKALIKES:
        raise UsageError(
            f"{task.name} asks about texts that can't be made here; put the prize's file into a folder as "
            f"{task.name}.jsonl and name the folder (--task-dir DIR)."
        )
    return questions(LOOKALIKES[task.name](rows, seed), task.name, f"{LOOKALIKE}, seed {seed}")


def made_here() -> list[str]:
    """Names of the tasks that have a look-alike."""
    return [name for name in TASKS if name in LOOKALIKES]


def check_task(name: str, folder: str | Path | None = None) -> None:
    """As :func:`find_questions`, of what can be told before anything is made."""
    find_questions(name, folder, rows=1)


def _published(task: Task, folder: Path) -> Path | None:
    names = (task.name, *(alias for alias, known in ALIASES.items() if known == task.name))
    spellings = {spelling for name in names for spelling in (name, name.replace("-", "_"))}
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".csv", ".jsonl") and p.is_file())
    return next((p for p in files if p.stem.lower() in spellings), None)
