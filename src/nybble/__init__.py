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
from typing import TYPE_CHECKING

from nybble.core.imports import callable_too, lazily, when_imported
from nybble.core.versions import VERSION

__version__ = VERSION

if TYPE_CHECKING:  # what the names below are, for type checkers and editors
    from nybble import optim as optim
    from nybble.core.errors import NybbleError as NybbleError
    from nybble.eval import evaluate as evaluate
    from nybble.pipelines.convert import convert as convert
    from nybble.pipelines.export import export as export
    from nybble.pipelines.load import load as load
    from nybble.pipelines.quantize import preflight as preflight
    from nybble.pipelines.quantize import quantize as quantize
    from nybble.pipelines.quantize import quantize_many as quantize_many
    from nybble.pipelines.save import save as save
    from nybble.pipelines.search import search as search
    from nybble.qtensor import QTensor as QTensor
    from nybble.quantizer import Quantizer as Quantizer
    from nybble.recipe import Recipe as Recipe
    from nybble.scheme import Scheme as Scheme
    from nybble.walk.settings import Settings as Settings

_NAMES = {
    "Quantizer": "nybble.quantizer",
    "QTensor": "nybble.qtensor",
    "Scheme": "nybble.scheme",
    "Recipe": "nybble.recipe",
    "Settings": "nybble.walk.settings",
    "quantize": "nybble.pipelines.quantize",
    "quantize_many": "nybble.pipelines.quantize",
    "preflight": "nybble.pipelines.quantize",
    "load": "nybble.pipelines.load",
    "save": "nybble.pipelines.save",
    "evaluate": "nybble.eval",
    "convert": "nybble.pipelines.convert",
    "export": "nybble.export",  # the room of targets, which can be called
    "search": "nybble.search",  # likewise, of searches
    "optim": "nybble.optim",
    "NybbleError": "nybble.core.errors",
}

__all__ = [*_NAMES, "__version__"]
__getattr__ = lazily(__name__, _NAMES)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def _import(name: str) -> None:
    importlib.import_module(name)


when_imported("transformers.quantizers.auto", partial(_import, "nybble.checkpoint.transformers_compressed"))
when_imported("nybble.export", partial(callable_too, "nybble.export", "nybble.pipelines.export"))
when_imported("nybble.search", partial(callable_too, "nybble.search", "nybble.pipelines.search"))
when_imported("peft.tuners.lora.model", partial(_import, "nybble.training.peft_hook"))
