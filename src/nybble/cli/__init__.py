"""The command line: one file a command; each module of this folder defines ``command``, a function that Typer reads."""

from __future__ import annotations

import importlib
import pkgutil
import sys

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
        app.command(name=module)(importlib.import_module(f"nybble.cli.{module}").command)
    return app


def _root() -> None:
    """Low-bit neural networks: quantize, evaluate, inspect, generate."""


def main() -> None:
    """Entry point of ``nybble``; exit codes 0 success, 2 bad arguments, 1 failure."""
    try:
        build()()
    except UsageError as error:
        sys.exit(fail(str(error), 2))
    except NybbleError as error:
        sys.exit(fail(str(error), 1))
    except KeyboardInterrupt:
        sys.exit(
            fail("interrupted. What was finished is kept in OUT.partial; repeat the command with --resume to go on.", 1)
        )
