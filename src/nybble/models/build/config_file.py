"""config.json -> a transformers config, from a file that nobody vouches for.

The dictionary is parsed and checked here, then handed to the config class that transformers itself ships for its
``model_type``. Nothing the file says can load code: ``auto_map`` and the keys that name kernels are dropped.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.core.errors import FileError, ModelError, did_you_mean
from nybble.core.guard import reading
from nybble.models.own import register_own

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MAX_BYTES = 64 << 20
# Config classes build a list or a dictionary this long (layer_types, id2label), so a mutated count eats all memory.
COUNTED = re.compile(r"layer|block|expert|label|depth|group|stage|codebook|loops|step")
MAX_COUNT = 100_000
# Keys that make transformers run or fetch code, or read other files than the ones that were checked.
DROPPED = frozenset(
    [
        *("auto_map", "custom_pipelines", "use_kernels", "kernel_config", "fusion_config", "distributed_config"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
        *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
        *("transformers_weights", "extra_files", "_commit_hash"),
    ]
)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most 64 MiB.

    Raises:
        FileError: missing, too large, not JSON, or not an object.
    """
    if not path.is_file():
        raise FileError(f"{path} is missing.")
    if path.stat().st_size > MAX_BYTES:
        raise FileError(f"{path} has {path.stat().st_size} bytes; a JSON file of a model has at most {MAX_BYTES}.")
    with reading(path):
        data = json.loads(path.read_bytes())
    if not isinstance(data, dict):
        raise FileError(f"{path} holds a JSON {type(data).__name__}; an object is needed.")
    return data


def _cleaned(value: Any, place: str) -> Any:
    """Drop the keys that could load code and refuse counts that could fill the memory, at any depth."""
    if isinstance(value, list):
        return [_cleaned(v, place) for v in value]
    if not isinstance(value, dict):
        return value
    for key, item in value.items():
        number = isinstance(item, int | float) and not isinstance(item, bool)
        if number and COUNTED.search(key) and not abs(item) <= MAX_COUNT:
            raise FileError(f"{place}: {key} = {item} is not believable; at most {MAX_COUNT} is accepted.")
    return {k: _cleaned(v, place) for k, v in value.items() if k not in DROPPED}


def _check_timm(config: dict[str, Any], place: str) -> None:
    """Refuse what would let timm fetch or open another file: names with a scheme, arguments that aren't numbers."""
    architecture, arguments = config.get("architecture", ""), config.get("model_args") or {}
    if not re.fullmatch(r"[\w.]*", str(architecture)):
        raise FileError(f"{place}: architecture {architecture!r:.80} is not the name of a network.")
    bad = [key for key, value in dict(arguments).items() if not isinstance(value, bool | int | float)]
    if bad or "pretrained" in arguments:
        raise FileError(f"{place}: model_args may hold numbers only, and has {bad or ['pretrained']}.")


def make_config(raw: dict[str, Any], place: str) -> PreTrainedConfig:
    """Build the transformers config that ``raw`` describes.

    Args:
        raw: the parsed config.json, or what a GGUF's metadata says in the same words.
        place: the file, for messages.

    Raises:
        ModelError: ``model_type`` is missing or unknown to the installed transformers.
        FileError: a value that the config class refuses, or that could make it fetch a file.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    with reading(place):
        # Infinities (Mamba's limits) are written as {"__float__": "Infinity"}, since JSON has none.
        clean = _cleaned(PreTrainedConfig._decode_special_floats(raw), place)
    model_type = clean.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ModelError(f"{place} has no model_type; transformers can't tell what kind of model it is.")
    if model_type not in CONFIG_MAPPING:
        register_own()
    with reading(place):
        if model_type not in CONFIG_MAPPING:
            hint = did_you_mean(model_type, sorted(CONFIG_MAPPING.keys()))
            hint = hint if "Did you" in hint else " A newer transformers may know it; code in the folder is never run."
            raise ModelError(f"{place}: model_type {model_type!r} is unknown to the installed transformers.{hint}")
        _check_timm(clean, place)
        config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(clean)
    return config
