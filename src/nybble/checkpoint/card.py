"""The README.md of a quantized model's folder: what it is, and how to load it, with nybble or without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nybble.core.versions import VERSION
from nybble.scheme import in_short

CARD = "README.md"

_USUAL = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM")
"""Where several classes find an architecture, one of these."""

_TEXT = """---
library_name: transformers
tags: [nybble, quantized]
---

# A quantized {architecture}

nybble {version} made these files{how}. **Loading them needs the Python package nybble.** transformers does not know
this format by itself: without `import nybble` it gives the layers random weights, with no more than a warning, and a
language model then writes fluent nonsense.
{why}

```python
import nybble  # before from_pretrained: it registers the format
from transformers import {auto}

model = {auto}.from_pretrained(".")  # this folder, or its id on the hub
```

`nybble.load(".")` gives the model and its tokenizer, if it has one, and checks the files first.
{scheme}
{record}"""

_RECORD = """`nybble inspect .` says what every byte is for, `nybble report .` what each layer lost; nybble.json
records the run.
"""

_OTHER_FORM = """
It is not in the form of compressed-tensors, which other programs load without nybble:

> {why}
"""

_LOADS_ANYWHERE = """---
library_name: transformers
tags: [compressed-tensors, quantized]
---

# A quantized {architecture}

{text}

```python
from transformers import {auto}  # with `pip install compressed-tensors`

model = {auto}.from_pretrained(".")  # this folder, or its id on the hub
```

nybble {version} made these files{how}; with it, `nybble.load(".")` keeps the weights packed. Where compressed-tensors
is not installed, so does transformers, once nybble is imported, by the nybble.json of a folder on disk; given an id on
the hub, `from_pretrained` doesn't fetch that file (`hf download ID --local-dir DIR` does, and DIR loads).
{scheme}
{record}"""


def card(config: Mapping[str, Any], manifest: Mapping[str, Any], why: str = "") -> str:
    """The card of a model in nybble's own form.

    Args:
        config: of config.json, with ``architectures`` and ``model_type``.
        manifest: of the run; empty where there was none.
        why: it isn't in compressed-tensors' form; empty where nobody asked.
    """
    return _filled(_TEXT, config, manifest, why=_OTHER_FORM.format(why=why) if why else "")


def compressed_card(config: Mapping[str, Any], manifest: Mapping[str, Any], text: str) -> str:
    """The card of a model in compressed-tensors' form; ``text`` says who loads it. Otherwise as :func:`card`."""
    return _filled(_LOADS_ANYWHERE, config, manifest, text=text)


def _filled(template: str, config: Mapping[str, Any], manifest: Mapping[str, Any], **texts: str) -> str:
    architecture = (config.get("architectures") or ["model"])[0]
    recipe = manifest.get("recipe") or {}
    return template.format(
        architecture=architecture,
        version=VERSION,
        how=f" with the recipe `{recipe['name']}`" if recipe else "",
        auto=_auto_class(architecture, str(config.get("model_type", ""))),
        scheme=_scheme(recipe.get("scheme") or {}),
        record=_RECORD,
        **texts,
    )


def _auto_class(architecture: str, model_type: str) -> str:
    """The transformers class that finds this architecture; ``AutoModel`` where none does."""
    from transformers.models.auto import modeling_auto

    for name in (*_USUAL, *(name for name in vars(modeling_auto) if name.startswith("AutoModelFor"))):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        found = () if mapping is None else mapping._model_mapping.get(model_type, ())
        if architecture in ((found,) if isinstance(found, str) else found):
            return name
    return "AutoModel"


def _scheme(scheme: Mapping[str, Any]) -> str:
    lines = []
    for rule in scheme.get("rules", ()):
        parts = ", ".join(f"{what} `{line}`" for what, line in rule.items() if what != "targets")
        named = in_short(dict.fromkeys(rule["targets"], 1))
        lines.append(f"- {', '.join(f'`{target}`' for target in named)}: {parts}")
    if "kv" in scheme:
        lines.append(f"- KV cache: `{scheme['kv']}`")
    return "\n" + "\n".join(lines) + "\n" if lines else ""
