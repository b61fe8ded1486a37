"""The command line: one file a command; each module of this folder defines ``command``, which Typer reads.

A folder in it is a group of commands (``nybble lab sweep``).

Modules import what is heavy inside their functions, so that help and mistakes in what was typed are answered at once.
A module may also define ``interrupted``, which gets the command's arguments and says what Ctrl-C left behind.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import FrameType, ModuleType
from typing import Annotated, Any

import typer

from nybble.cli._output import fail, is_silent, print_json_error
from nybble.core.errors import NybbleError, UsageError
from nybble.core.versions import VERSION


def _say_version(asked: bool) -> None:
    if asked:
        print(f"nybble {VERSION}")
        raise typer.Exit


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
    _add_commands(app, __name__)
    return app


def _add_commands(app: typer.Typer, package: str) -> None:
    """The modules of a folder as commands; a folder in it is a group of them, its docstring what it is for."""
    folder = importlib.import_module(package)
    for found in sorted(pkgutil.iter_modules(folder.__path__), key=lambda found: found.name):
        if found.name.startswith("_"):
            continue
        name = f"{package}.{found.name}"
        if found.ispkg:
            about = (importlib.import_module(name).__doc__ or "").strip()
            group = typer.Typer(name=found.name, help=about, no_args_is_help=True)
            _add_commands(group, name)
            app.add_typer(group)
        else:
            app.command(name=found.name)(_guarded(importlib.import_module(name)))


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print nybble's version.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    """Low-bit neural networks: quantize, evaluate, inspect, generate."""


def _guarded(module: ModuleType) -> Callable[..., None]:
    """The module's command with its errors as one line on standard error: exit codes 2 bad arguments, 1 failure."""

    @wraps(module.command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        with _noting_interrupts() as interrupts:
            try:
                module.command(*args, **kwargs)
            except typer.Exit:
                raise
            except (Exception, KeyboardInterrupt) as error:
                json = bool(kwargs.get("json"))
                if interrupts or isinstance(error, KeyboardInterrupt):
                    say = getattr(module, "interrupted", lambda **_: "interrupted.")
                    raise typer.Exit(fail(say(**kwargs), 1, "Interrupted" if json else "")) from error
                kind = type(error).__name__ if json else ""
                if not isinstance(error, NybbleError):
                    if json:
                        print_json_error(str(error), 1, kind)
                    raise
                raise typer.Exit(fail(str(error), 2 if isinstance(error, UsageError) else 1, kind)) from error

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


def _warning(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
    """A warning as errors are printed: a line of source code says nothing to who typed a command."""
    return f"nybble: warning: {message}\n"


def main() -> None:
    """Entry point of ``nybble``; exit codes 0 success, 2 bad arguments, 1 failure."""
    warnings.formatwarning = _warning
    if is_silent():  # one process says what there is to say; what went wrong unforeseen, each
        warnings.simplefilter("ignore")
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  (for good)
    if "--json" not in sys.argv[1:]:
        build()()
    try:
        sys.exit(build()(standalone_mode=False))
    except Exception as error:
        if not hasattr(error, "format_message"):  # what Typer's parser raises for what was typed
            raise
        sys.exit(fail(error.format_message(), 2, "UsageError"))
