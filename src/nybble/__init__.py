"""nybble: low-bit neural networks, any published method on any number format.

>>> import nybble
>>> str(nybble.Quantizer("float4_e2m1fn", group=32))
'float4_e2m1fn group=32'

Importing it is light (no torch, no transformers until a name is used). Once transformers is imported, models that
nybble wrote load with ``AutoModelForCausalLM.from_pretrained``; once PEFT is, its LoRA trains on top of packed layers.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from nybble.core.imports import when_imported
from nybble.core.versions import VERSION

__version__ = VERSION

_NAMES = {
    "Quantizer": "nybble.quantizer",
    "QTensor": "nybble.qtensor",
    "Scheme": "nybble.scheme",
    "Recipe": "nybble.recipe",
    "Settings": "nybble.walk.settings",
    "quantize": "nybble.pipelines.quantize",
    "quantize_many": "nybble.pipelines.quantize",
    "load": "nybble.pipelines.load",
    "save": "nybble.checkpoint.save",
    "evaluate": "nybble.eval",
}

__all__ = [*_NAMES, "__version__", "optim"]


def __getattr__(name: str) -> Any:
    if name == "optim":
        return importlib.import_module("nybble.optim")
    if name not in _NAMES:
        raise AttributeError(f"module 'nybble' has no attribute {name!r}")
    return getattr(importlib.import_module(_NAMES[name]), name)


def _import(name: str) -> None:
    importlib.import_module(name)


when_imported("transformers.quantizers.auto", partial(_import, "nybble.checkpoint.transformers_hook"))
when_imported("peft.tuners.lora.model", partial(_import, "nybble.training.peft_hook"))
