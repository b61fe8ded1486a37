"""Networks that transformers lacks and whose training is shown here: one a file, a ``PreTrainedModel`` as ``PART``.

They save and load as transformers' own: a folder's ``model_type`` (``nybble-`` and the file's name) and
``architectures`` find them, also by ``AutoConfig``. Other packages add networks through entry points of the group
``nybble.models.own``.
"""

from __future__ import annotations

from typing import Any

from nybble.core.registry import Registry

OWN = Registry("nybble.models.own", "network", lambda part: isinstance(getattr(part, "config_class", None), type))


def own_class(name: str) -> Any:
    """The class of a name, as ``architectures`` has it; None where there is none."""
    return next((part for part in OWN.all().values() if part.__name__ == name), None)


def register_own() -> None:
    """Let transformers know the configs of these networks by their ``model_type``."""
    from transformers import AutoConfig, AutoModel

    for part in OWN.all().values():
        AutoConfig.register(part.config_class.model_type, part.config_class, exist_ok=True)
        AutoModel.register(part.config_class, part, exist_ok=True)
