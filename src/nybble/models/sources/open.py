"""From what the user named to the source that reads it."""

from __future__ import annotations

from pathlib import Path

from nybble.core.errors import FileError, ModelError
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
    if (path.suffix.lower() == ".gguf" and not path.is_dir()) or _begins(path) == b"GGUF":
        from nybble.models.sources.gguf_file import GgufSource

        return GgufSource(spec, path)
    if path.is_dir() and not (path / "config.json").exists() and (parts := sorted(path.glob("*.[gG][gG][uU][fF]"))):
        raise ModelError(f"{spec} has no config.json and holds {parts[0].name}; give that file.")
    if path.is_dir():
        from nybble.models.sources.folder import FolderSource

        return FolderSource(spec, path)
    if path.exists():
        hint = " Give the folder that it is in." if path.suffix.lower() == ".safetensors" else ""
        raise FileError(
            f"{spec} is a file that is neither a .gguf nor a folder with config.json and safetensors.{hint}"
        )
    from nybble.models.sources.hub import open_hub

    return open_hub(spec)


def _begins(path: Path) -> bytes:
    """The first four bytes of a file, whatever its name ends in; nothing of what is no readable file."""
    try:
        with path.open("rb") as file:
            return file.read(4)
    except (OSError, ValueError):
        return b""
