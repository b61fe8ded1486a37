"""What is in the files that a run reads, as a hash: the same model in another folder is the same model."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nybble.core.files import disk_errors

WHOLE, SAMPLE, SAMPLES = 1 << 30, 1 << 20, 64
"""Files of up to 1 GiB are read whole; of larger ones the size and 64 pieces of 1 MiB, evenly spaced."""

_KNOWN: dict[tuple[tuple[str, int, int], ...], str] = {}
"""Signature -> hash, of what this process has read."""


def fingerprint(path: str) -> str | None:
    """``sha256:`` and a hash of a file, or of all files of a folder with their names; None where there is neither.

    Args:
        path: a local path, or a name that is none: a hub id, ``builtin``.

    Raises:
        FileError: a file can't be read.
    """
    place = Path(path)
    if not path or not place.exists():
        return None
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
    with disk_errors(place):
        stats = [(str(file), file.stat()) for file in files]
        signature = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
        if signature not in _KNOWN:
            digest = hashlib.sha256()
            for file in files:
                # of a single file its name says nothing: a copy of it is the same data
                name = "" if file == place else str(file.relative_to(place))
                digest.update(f"{name}\0{file.stat().st_size}\0".encode())
                _read(file, digest)
            _KNOWN[signature] = f"sha256:{digest.hexdigest()}"
    return _KNOWN[signature]


def _read(file: Path, digest: hashlib._Hash) -> None:
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= WHOLE:
            while piece := opened.read(SAMPLE):
                digest.update(piece)
            return
        for number in range(SAMPLES):
            opened.seek((size - SAMPLE) * number // (SAMPLES - 1))
            digest.update(opened.read(SAMPLE))
