"""From what the user named to the source that reads it."""

from __future__ import annotations

from pathlib import Path

from nybble.core.errors import FileError, ModelError
from nybble.models.build.config_file import read_json
from nybble.models.named import check_model
from nybble.models.pipeline_parts import INDEX
from nybble.models.sources import ModelSource


def open_source(spec: str) -> ModelSource:
    """Open what the user named.

    Args:
        spec: a folder with config.json and safetensors, a pipeline's with model_index.json, a ``.gguf`` file,
            ``demo:smollm2``, ``demo:minilm``, a hub id.

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
    if path.is_dir():
        if (path / INDEX).is_file() and not (path / "config.json").exists():
            from nybble.models.sources.pipeline import open_pipeline

            return open_pipeline(spec, path)
        _check_whole(spec, path)
        from nybble.models.sources.folder import FolderSource

        return FolderSource(spec, path)
    if path.exists():
        hint = " Give the folder that it is in." if path.suffix.lower() == ".safetensors" else ""
        raise FileError(
            f"{spec} is a file that is neither a .gguf nor a folder with config.json and safetensors.{hint}"
        )
    from nybble.models.sources.hub import open_hub

    return open_hub(spec)


def _check_whole(spec: str, folder: Path) -> None:
    """Raise ModelError for a folder that holds something else than a model, and say what to give."""
    if (folder / "config.json").exists():
        return
    if parts := sorted(folder.glob("*.[gG][gG][uU][fF]")):
        raise ModelError(f"{spec} has no config.json and holds {parts[0].name}; give that file.")
    if (folder / "adapter_config.json").exists():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        merged = f"{folder / 'merged'}, both as one" if (folder / "merged").is_dir() else "train with --merge for both"
        raise ModelError(f"{spec} is an adapter and no model of its own; give its base, {base}, or {merged}.")


def _begins(path: Path) -> bytes:
    """The first four bytes of a file, whatever its name ends in; nothing of what is no readable file."""
    try:
        with path.open("rb") as file:
            return file.read(4)
    except (OSError, ValueError):
        return b""
