"""What a search has measured so far, a line a measurement: a run that was killed goes on with the same numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

Numbers = list[float]


class Kept:
    """Measurements by key; of a file, each is on disk before the next begins.

    Args:
        path: JSON lines, perhaps begun by a run that was killed; a line that it cut is measured again. None: in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._found: dict[str, Numbers] = {}
        if path is not None and path.exists():
            whole = path.read_bytes().rpartition(b"\n")[0]
            path.write_bytes(whole + b"\n" if whole else b"")
            self._found = dict(json.loads(line) for line in whole.splitlines())

    def __call__(self, key: str, measure: Callable[[], Numbers]) -> Numbers:
        """The numbers called ``key``, measured now unless they were before; Python's JSON keeps every bit of them."""
        if key not in self._found:
            self._found[key] = measure()
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, self._found[key]]) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
        return self._found[key]
