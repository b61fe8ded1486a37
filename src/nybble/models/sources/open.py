"""From what the user named to the source that reads it."""

from __future__ import annotations

from pathlib import Path

from nybble.core.errors import FileError
from nybble.models.named import check_model
from nybble.models.sources import ModelSource


def open_source(spec: str) -> ModelSource:
    """Open what the user named.

    Args:
        spec: a folder with config.json and safetensors, a ``.gguf`` file, ``demo:smollm2``, ``demo:minilm``, a hub id.

    Raises:
        ModelError: not a model, of an unknown kind, or only stored as a pickle.
        FileError: missing, truncated or malformed.
    """
    check_model(spec)
    path = Path(spec)
    if spec.startswith("demo:"):
        from nybble.models.sources.packages import open_demo

        return open_demo(spec)
    if path.suffix == ".gguf" and not path.is_dir():
        from nybble.models.sources.gguf_file import GgufSource

        return GgufSource(spec, path)
    if path.is_dir():
        from nybble.models.sources.folder import FolderSource

        return FolderSource(spec, path)
    if path.exists():
        raise FileError(f"{spec} is a file that is neither a .gguf nor a folder with config.json and safetensors.")
    from nybble.models.sources.hub import open_hub

    return open_hub(spec)
