"""Whether a folder holds a quantized model, whose, and in which form: from its JSON files alone, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nybble.core.errors import FileError
from nybble.core.files import check_folder
from nybble.models.build.config_file import read_json
from nybble.models.named import is_packed, stated_quantization

MANIFEST = "nybble.json"
FORM = "form"
"""Key of the manifest: the ``name`` of the form that the files are in; of :data:`COMPRESSED` also ``quantization``,
what config.json says of a folder in nybble's own; of that one ``why`` it isn't the other, where that was asked."""
NATIVE, COMPRESSED = "native", "compressed-tensors"


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """What nybble wrote into a ``config.json``; None where it wrote nothing.

    >>> quantization_of({"quantization_config": {"quant_method": "gptq"}}) is None
    True
    """
    found = config.get("quantization_config")
    return found if isinstance(found, dict) and found.get("quant_method") == "nybble" else None


def kept_beside(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Nybble's description of a folder that it wrote in compressed-tensors' form; None of every other folder.

    Args:
        folder: of the model.
        config: its config.json.

    Raises:
        FileError: nybble.json is there, and no JSON object.
    """
    stated = config.get("quantization_config")
    if not isinstance(stated, dict) or stated.get("quant_method") != COMPRESSED or not (folder / MANIFEST).is_file():
        return None
    form = read_json(folder / MANIFEST).get(FORM)
    found = form.get("quantization") if isinstance(form, dict) and form.get("name") == COMPRESSED else None
    return found if isinstance(found, dict) else None


def form_of(folder: Path) -> str:
    """The form of a folder that nybble wrote."""
    return NATIVE if kept_beside(folder, read_json(folder / "config.json")) is None else COMPRESSED


def is_quantized(folder: Path) -> bool:
    """Whether ``folder`` holds a checkpoint that nybble wrote, in any form."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    config = read_json(path)
    return quantization_of(config) is not None or kept_beside(folder, config) is not None


def check_quantized(folder: Path) -> None:
    """Raise FileError unless ``folder`` is one that nybble wrote."""
    check_folder(folder)
    read_json(folder / "config.json")
    if not is_quantized(folder):
        raise FileError(f"{folder} is not a model that nybble wrote: its config.json has no quantization by nybble.")


def is_others(folder: Path) -> bool:
    """Whether ``folder`` holds a checkpoint that another library quantized and nybble reads."""
    path = folder / "config.json"
    return path.is_file() and is_packed(stated_quantization(folder, read_json(path))) and not is_quantized(folder)


def check_readable(folder: Path) -> None:
    """Raise FileError unless ``folder`` holds a quantized model: nybble's, or another library's that nybble reads."""
    check_folder(folder)
    if not is_others(folder):
        check_quantized(folder)
