"""Results that couldn't be brought to the store: files on the worker's machine until it can be reached again."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from nybble.core.errors import FileError
from nybble.core.files import atomic_write_json, disk_errors
from nybble.lab.claim import Outcome, packed, unpacked
from nybble.lab.database import is_file, shown
from nybble.lab.store import Store


def outbox_of(place: str) -> Path:
    """The folder for a store: beside its file; of a database below ``$XDG_STATE_HOME``, ``~/.local/state``."""
    if is_file(place):
        path = Path(place)
        return path.with_name(f"{path.name}.outbox")
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    name = hashlib.sha256(shown(place).encode()).hexdigest()[:16]
    return Path(state) / "nybble" / "outbox" / name


def keep(place: str, key: str, outcome: Outcome) -> Path:
    """Write what became of a run; the file.

    Raises:
        FileError: it can't be written.
    """
    folder = outbox_of(place)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.json"
    atomic_write_json(path, {**asdict(outcome), "result": packed(outcome.result)})
    return path


def send(store: Store) -> int:
    """Bring what is left to its store, and remove it; how many files.

    Raises:
        StoreError: the store can't be written; the files stay. FileError: a file can't be read.
    """
    paths = sorted(outbox_of(store.place).glob("*.json"))
    for path in paths:
        store.deliver(path.stem, _read(path))
        path.unlink(missing_ok=True)  # another process may have sent it, too
    return len(paths)


def _read(path: Path) -> Outcome:
    with disk_errors(path):
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        data = json.loads(text)
        return Outcome(**{**data, "result": unpacked(data["result"])})
    except (ValueError, TypeError, KeyError) as error:
        raise FileError(
            f"{path} is no result that a worker kept, or is damaged; remove it, and the run is run again."
        ) from error
