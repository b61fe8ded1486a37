"""Progress of long work: a protocol, a silent default, and a bar on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as _RichBars
    from rich.progress import TaskID


class Progress(Protocol):
    """What long work reports to. Tasks nest: ``advance`` and ``done`` speak of the one started last."""

    def start(self, total: int, what: str) -> None:
        """Begin a task of ``total`` steps; ``what`` is shown beside the bar."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count ``n`` steps as done; a ``note`` replaces the one shown."""

    def done(self) -> None:
        """End the task, finished or not."""


class Silent:
    """Reports nothing: the library's default."""

    def start(self, total: int, what: str) -> None:
        """Ignore a new task."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Ignore steps."""

    def done(self) -> None:
        """Ignore the end."""


SHOWN: ContextVar[Progress] = ContextVar("SHOWN", default=Silent())  # noqa: B039  (it keeps nothing)
"""What the writers of files report to: they are called through several layers that have nothing to say of it."""


@contextmanager
def showing(progress: Progress) -> Iterator[None]:
    """Let the writers of files report to ``progress`` while the block runs."""
    before = SHOWN.set(progress)
    try:
        yield
    finally:
        SHOWN.reset(before)


class Bars:
    """Bars with counts and time left, drawn by Rich on standard error.

    Args:
        console: where to draw; standard error if None, so that standard output stays clean for ``--json``.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._bars: _RichBars | None = None
        self._tasks: list[TaskID] = []

    def start(self, total: int, what: str) -> None:
        """Begin a task; its bar appears below those of the tasks around it."""
        if self._bars is None:
            self._bars = self._open()
            self._bars.start()
        self._tasks.append(self._bars.add_task(what, total=total, note=""))

    def advance(self, n: int = 1, note: str = "") -> None:
        """Move the innermost bar by ``n``."""
        bars, task = self._innermost("advance")
        bars.advance(task, n)
        if note:
            bars.update(task, note=note)

    def done(self) -> None:
        """Close the innermost bar; the last one to close stays on the screen."""
        bars, task = self._innermost("done")
        self._tasks.pop()
        if self._tasks:
            bars.remove_task(task)
        else:
            bars.stop()
            self._bars = None

    def _innermost(self, call: str) -> tuple[_RichBars, TaskID]:
        if self._bars is None:
            raise RuntimeError(f"Progress.{call}() before start()")
        return self._bars, self._tasks[-1]

    def _open(self) -> _RichBars:
        # Imported here: Rich takes longer to load than all of nybble.core.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichBars

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        return RichBars(*columns, console=self._console or Console(stderr=True))


@contextmanager
def task(progress: Progress, total: int, what: str) -> Iterator[Progress]:
    """Run a task that ends with the block, also when it raises.

    >>> with task(Silent(), 2, "layers") as bar:
    ...     bar.advance(note="model.layers.0")
    """
    progress.start(total, what)
    try:
        yield progress
    finally:
        progress.done()
