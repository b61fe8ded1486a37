"""What commands print: one JSON object on standard output, or tables; everything else goes to standard error."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any


def print_json(value: dict[str, Any]) -> None:
    """Exactly one JSON object; NaN and infinities become null and strings."""
    sys.stdout.write(json.dumps(_plain(value), ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def is_silent() -> bool:
    """Whether torchrun started this process beside the one that speaks."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0"


def note(text: str) -> None:
    """A line for people, on standard error."""
    if not is_silent():
        print(text, file=sys.stderr, flush=True)


def fail(text: str, code: int, kind: str = "") -> int:
    """An error for people, and with its ``kind`` for programs too; returns the exit code."""
    note(f"nybble: {text}")
    if kind:
        print_json_error(text, code, kind)
    return code


def print_json_error(text: str, code: int, kind: str) -> None:
    """What ``--json`` prints in place of a result: the error's class, its message, and the exit code."""
    print_json({"error": {"type": kind, "message": text, "exit_code": code}})


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; columns of numbers are aligned right, others left."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left")
    for i, column in enumerate(columns):
        numbers = all(re.match(r"[-+]?(\d|inf|nan|$)", row[i]) for row in rows)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 132).print(table)


def megabytes(count: float) -> str:
    """Bytes as MB of 10^6."""
    return f"{count / 1e6:,.1f} MB"
