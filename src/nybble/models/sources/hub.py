"""A model on the Hugging Face hub: its safetensors and JSON files are fetched into the hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from nybble.core.errors import ModelError
from nybble.models.sources.folder import FolderSource
from nybble.models.sources.side_files import SIDE_FILES

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# No .bin, .pt or .py: pickles and code are never fetched.
WANTED = ["*.safetensors", "*.json", *SIDE_FILES]


def open_hub(spec: str) -> FolderSource:
    """Fetch the model with this id, or find it in the cache.

    Raises:
        ModelError: neither a path nor an id; or it can't be fetched, because there is no network or no such model.
    """
    if not HUB_ID.fullmatch(spec):
        raise ModelError(f"{spec!r} is no folder, no .gguf file, and not shaped like a hub id (owner/name).")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(spec, allow_patterns=WANTED)
    except Exception as cause:
        text = " ".join(str(cause).split())[:200]
        raise ModelError(
            f"{spec!r} is not a local path, and fetching it from the hub failed ({type(cause).__name__}: {text})."
            " Offline, give a folder, a .gguf file or demo:smollm2."
        ) from cause
    return FolderSource(spec, Path(folder))
