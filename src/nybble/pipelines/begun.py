"""A search's folder in the making: gone on with, or begun anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nybble.checkpoint.parts import same_request
from nybble.core.errors import FileError
from nybble.core.files import atomic_write_json

REQUEST = "request.json"


def begin(partial: Path, request: Mapping[str, Any], resume: bool) -> None:
    """Go on in a folder that a killed run left, or clear it and keep the request.

    Raises:
        FileError: the run that is gone on with was asked for something else, named; or its request can't be read.
    """
    note, asked = partial / REQUEST, json.loads(json.dumps(request))
    if resume and note.exists():
        try:
            before = json.loads(note.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FileError(f"{note} can't be read ({error}); remove {partial} and begin anew.") from error
        same_request(partial, before, asked)
        return
    for child in partial.iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()
    atomic_write_json(note, asked)
