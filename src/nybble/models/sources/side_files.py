"""What stands beside the weights in a model's folder, as data: it goes along byte for byte, nothing is made anew.

Transformers reads more than it is willing to write (a temperature without sampling), and writes files in another form
than they came in. Names are patterns relative to the folder; what isn't listed (weights, code, configs of training)
stays behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

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
    "*preprocessor_config.json", "processor_config.json", "audio_tokenizer_config.json", "qformer_tokenizer/*",
    "speaker_embeddings_path.json",
)  # fmt: skip
"""How images, sound and video are prepared, and what puts them together with text."""
SENTENCE_FILES = (
    "modules.json", "config_sentence_transformers.json", "sentence_*_config.json", "[0-9]*_*/*config.json",
    "[0-9]*_*/*.safetensors",
)  # fmt: skip
"""How an encoder's token vectors become a sentence's, as sentence-transformers writes it."""
LICENSE_FILES = ("LICENSE*", "NOTICE*")
SIDE_FILES = (GENERATION, *TOKENIZER_FILES, *PROCESSOR_FILES, *SENTENCE_FILES, *LICENSE_FILES)


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of this name, relative to its folder, belongs to a tokenizer."""
    return any(fnmatch(name, pattern) for pattern in TOKENIZER_FILES)


def side_files(folder: Path) -> dict[str, Path]:
    """The files of :data:`SIDE_FILES` that ``folder`` has: name relative to it -> where it is."""
    found = {path for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def copy_side_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy ``files`` into ``folder`` under their names.

    Raises:
        FileError: one can't be read or written; names it.
    """
    for name, path in files.items():
        with disk_errors(folder / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        atomic_copy(path, folder / name)
