"""Networks that transformers lacks and whose training is shown here: one a file, a ``PreTrainedModel`` as ``PART``.

They save and load as transformers' own: a folder's ``model_type`` (``nybble-`` and the file's name) and
``architectures`` find them, also by ``AutoConfig``. Other packages add networks through entry points of the group
``nybble.models.own``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nybble.core.errors import ModelError
from nybble.core.registry import Registry

WEIGHTS = "diffusion_pytorch_model"
"""How diffusers calls its files of weights."""

OWN = Registry("nybble.models.own", "network", lambda part: isinstance(getattr(part, "config_class", None), type))


def own_class(name: str) -> Any:
    """The class of a name, as ``architectures`` has it; None where there is none."""
    return next((part for part in OWN.all().values() if part.__name__ == name), None)


def as_own(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """config.json of a denoiser of diffusers in the words of the network that holds it; any other as it is.

    Args:
        raw: what config.json says.
        folder: that it stands in, whose files diffusers names otherwise than transformers.

    Raises:
        ModelError: a class of diffusers that no network holds.
    """
    name = raw.get("_class_name")
    if name is None or "model_type" in raw:
        return dict(raw)
    holders = {held: part for part in OWN.all().values() for held in getattr(part, "classes", ())}
    if name not in holders:
        raise ModelError(
            f"{folder} holds a {name!r} of diffusers, which is no denoiser that can be quantized; there are "
            f"{', '.join(sorted(holders))}."
        )
    files = (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.safetensors.index.json")
    named = next((file for file in files if (folder / file).is_file()), None)
    return {
        "model_type": holders[name].config_class.model_type, "architectures": [holders[name].__name__],
        "network": dict(raw), **({} if named is None else {"transformers_weights": named}),
    }  # fmt: skip


def register_own() -> None:
    """Let transformers know the configs of these networks by their ``model_type``."""
    from transformers import AutoConfig, AutoModel

    for part in OWN.all().values():
        AutoConfig.register(part.config_class.model_type, part.config_class, exist_ok=True)
        AutoModel.register(part.config_class, part, exist_ok=True)
