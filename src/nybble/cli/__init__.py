"""The command line: one file a command; each module of this folder defines ``command``, which Typer reads.

A module may also define ``interrupted``, which gets the command's arguments and says what Ctrl-C left behind.
"""

from __future__ import annotations

import importlib
import pkgutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType, ModuleType
from typing import Any

import typer

from nybble.cli._output import fail
from nybble.core.errors import NybbleError, UsageError


def build() -> typer.Typer:
    """The application, with every command of this folder."""
    app = typer.Typer(
        name="nybble",
        help="Low-bit neural networks: quantize, evaluate, inspect, generate.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    app.callback()(_root)
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")):
        app.command(name=module)(_guarded(importlib.import_module(f"nybble.cli.{module}")))
    return app


def _root() -> None:
    """Low-bit neural networks: quantize, evaluate, inspect, generate."""


def _guarded(module: ModuleType) -> Callable[..., None]:
    """The module's command with its errors as one line on standard error: exit codes 2 bad arguments, 1 failure."""

    @wraps(module.command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        with _noting_interrupts() as interrupts:
            try:
                module.command(*args, **kwargs)
            except (Exception, KeyboardInterrupt) as error:
                if interrupts or isinstance(error, KeyboardInterrupt):
                    say = getattr(module, "interrupted", lambda **_: "interrupted.")
                    raise typer.Exit(fail(say(**kwargs), 1)) from error
                if not isinstance(error, NybbleError):
                    raise
                raise typer.Exit(fail(str(error), 2 if isinstance(error, UsageError) else 1)) from error

    return guarded


@contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C adds to: compiled code may turn the KeyboardInterrupt that it raises into another error."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def main() -> None:
    """Entry point of ``nybble``; exit codes 0 success, 2 bad arguments, 1 failure."""
    build()()
