"""What makes a module a model of transformers: not that it has something called ``config``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def config_of(module: Any) -> PreTrainedConfig | None:
    """The transformers config of a module; None of others, which may keep settings of their own under that name.

    A model of transformers can't be there before transformers is, so this never imports it.
    """
    if "transformers" not in sys.modules:
        return None
    from transformers import PreTrainedConfig

    found = getattr(module, "config", None)
    return found if isinstance(found, PreTrainedConfig) else None
