"""What every folder of a target has beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nybble.core.files import atomic_write_text
from nybble.core.versions import VERSION
from nybble.export._source import Source
from nybble.models.sources.side_files import copy_side_files

SHARD_BYTES = 5_000_000_000

_CARD = """---
library_name: {library}
tags: [quantized]
---

# A quantized {architecture}

{text}

nybble {version} wrote it.
"""


def write_beside(source: Source, folder: Path, text: str, library: str = "transformers") -> None:
    """Tokenizer, chat template, generation settings as they came, and a card.

    Args:
        source: what is written.
        folder: where to.
        text: how the folder is loaded.
        library: that loads it.
    """
    copy_side_files(source.side_files(), folder)
    architecture = (source.config.get("architectures") or ["model"])[0]
    card = _CARD.format(architecture=architecture, text=text, version=VERSION, library=library)
    atomic_write_text(folder / "README.md", card)


def head_width(source: Source) -> int | None:
    """Columns of one head's keys, where config.json says so."""
    config: Any = source.transformers_config.get_text_config(decoder=True)
    found = getattr(config, "head_dim", None)
    if found is None and hasattr(config, "num_attention_heads"):
        found = config.hidden_size // config.num_attention_heads
    return found if isinstance(found, int) else None
