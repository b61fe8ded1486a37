"""What stands beside the weights in a model's folder, as data: it goes along byte for byte, nothing is made anew.

Transformers reads more than it is willing to write (a temperature without sampling), and writes files in another form
than they came in. Names are patterns relative to the folder; what isn't listed (weights, code, configs of training)
stays behind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from nybble.core.files import atomic_copy, disk_errors

GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer*.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json", "chat_template.*",
    "additional_chat_templates/*.jinja", "vocab*.json", "vocab*.txt", "target_vocab.json", "merges.txt", "bpe.codes",
    "*.spm", "*.tiktoken", "tiktoken.model", "spiece.model", "spm*.model", "sentencepiece*.model", "tekken.json",
    "byte_maps.json", "dict.txt", "emoji.json", "entity_vocab.json", "normalizer.json", "prophetnet.tokenizer",
    "word_pronunciation.json", "word_shape.json",
)  # fmt: skip
PROCESSOR_FILES = (
    "*preprocessor_config.json", "processor_config.json", "audio_tokenizer_config.json",
    "speaker_embeddings_path.json", "alphabet.json", "language_model/*", "*tokenizer/*",
)  # fmt: skip
"""How images, sound and video are prepared, and what puts them together with text."""
SENTENCE_FILES = (
    "modules.json", "config_sentence_transformers.json", "sentence_*_config.json", "router_config.json",
    "[0-9]*_*/*config.json", "[0-9]*_*/*.safetensors",
)  # fmt: skip
"""How an encoder's token vectors become a sentence's, as sentence-transformers writes it; the folders go with them."""
HEAD_FILES = ("head.safetensors", "readout.safetensors", "decision*.json", "judge_config.json", "calibration.json",
              "decision_template.jinja")  # fmt: skip
"""Of heads that decide, beside a language model's weights (``extra_files`` of transformers' configs)."""
UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".py")
"""Endings of what is never read nor passed on: pickles, code."""
LICENSE_FILES = ("LICENSE*", "NOTICE*")
SIDE_FILES = (GENERATION, *TOKENIZER_FILES, *PROCESSOR_FILES, *SENTENCE_FILES, *HEAD_FILES, *LICENSE_FILES)


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of this name, relative to its folder, belongs to a tokenizer."""
    return any(fnmatch(name, pattern) for pattern in TOKENIZER_FILES)


def side_files(folder: Path) -> dict[str, Path]:
    """The files of :data:`SIDE_FILES` that ``folder`` has: name relative to it -> where it is."""
    found = {path for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file()} | _of_modules(folder)
    found = {path for path in found if path.suffix not in UNSAFE or path.parent.name == "language_model"}  # KenLM's
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def left_behind(folder: Path) -> list[str]:
    """What a sentence encoder needs and is not passed on, as it is a pickle or code: names relative to ``folder``."""
    return sorted(path.relative_to(folder).as_posix() for path in _of_modules(folder) if path.suffix in UNSAFE)


def _of_modules(folder: Path) -> set[Path]:
    """All files of the folders that a sentence encoder's modules lie in, wherever its lists say."""
    return {path for name in _modules(folder) for path in (folder / name).rglob("*") if path.is_file()}


def _modules(folder: Path) -> list[str]:
    """Names of those folders, within ``folder``; lists that can't be read name none (who uses them says so)."""
    names: list[str] = []
    for file, listed in (("modules.json", _paths), ("router_config.json", _routes)):
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            names += listed(json.loads((folder / file).read_bytes()))
    parts = {name: PurePosixPath(name).parts for name in names}
    return [name for name in names if parts[name] and ".." not in parts[name] and not name.startswith("/")]


def _paths(modules: Any) -> list[str]:
    return [str(module["path"]) for module in modules]


def _routes(router: Any) -> list[str]:
    return [str(name) for name in router["types"]]


def copy_side_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy ``files`` into ``folder`` under their names.

    Raises:
        FileError: one can't be read or written; names it.
    """
    for name, path in files.items():
        with disk_errors(folder / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        atomic_copy(path, folder / name)
