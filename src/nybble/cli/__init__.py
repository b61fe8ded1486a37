"""The command line: one file a command; each module of this folder defines ``command``, a function that Typer reads."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import wraps
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
        app.command(name=module)(_guarded(importlib.import_module(f"nybble.cli.{module}").command))
    return app


def _root() -> None:
    """Low-bit neural networks: quantize, evaluate, inspect, generate."""


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its errors as one line on standard error: exit codes 2 bad arguments, 1 failure."""

    @wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except NybbleError as error:
            raise typer.Exit(fail(str(error), 2 if isinstance(error, UsageError) else 1)) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(fail("interrupted.", 1)) from error

    return guarded


def main() -> None:
    """Entry point of ``nybble``; exit codes 0 success, 2 bad arguments, 1 failure."""
    build()()
