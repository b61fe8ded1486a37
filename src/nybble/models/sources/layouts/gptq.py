"""GPTQ (AutoGPTQ, GPTQModel, auto-round): integers of 2 to 8 bits, zero points, and columns in an order of their own.

``qweight`` int32 [words of in, out], a little-endian stream down each column; ``qzeros`` int32 [groups, words of out];
``scales`` [groups, out]; ``g_idx`` int32 [in], the group of each input. x = scale * (code - zero point).

The trap: files of ``checkpoint_format`` gptq (the first, and what is meant where none is named) hold zero points *less
one*; gptq_v2 holds them as they are, and so does gptq_p, whose codes of 3, 5, 6 and 7 bits are cut into planes.
``dynamic`` gives modules, by patterns of their names, bits and sizes of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nybble.core.errors import FileError, ModelError
from nybble.models.sources.layouts import Files, Layout, PackedWeight, whole
from nybble.models.sources.layouts._patterns import compiled
from nybble.models.sources.layouts._words import Words, gptq_weight

LESS_ONE = {"gptq": 1, "gptq_v2": 0, "gptq_p": 0}


class Gptq(Layout):
    """See the module."""

    def weights(self, config: Mapping[str, Any], files: Files) -> Iterator[PackedWeight]:  # noqa: D102
        form = config.get("checkpoint_format") or "gptq"
        if form not in LESS_ONE:
            raise ModelError(f"{files.place} has the checkpoint_format {form!r:.40}; readable: {', '.join(LESS_ONE)}.")
        for module in files.ending("qweight"):
            yield gptq_weight(module, _words(module, config, str(form)), files)


def _words(module: str, config: Mapping[str, Any], form: str) -> Words:
    said = {"group_size": -1, **config, **_own(module, config.get("dynamic") or {})}
    bits = whole(said.get("bits"), 2, 8, f"bits of {module}")
    size = whole(said["group_size"], -1, 1 << 30, f"group_size of {module}")
    return Words(bits=bits, size=size, less=LESS_ONE[form], planar=form == "gptq_p")


def _own(module: str, dynamic: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the first pattern that fits a module's name gives it: "+:", or nothing, and a regular expression."""
    for key, values in dynamic.items():
        fits = compiled(key.removeprefix("+:").removeprefix("-:")).match(module)
        if fits and (key.startswith("-:") or not isinstance(values, dict)):
            raise FileError(f"{module} is quantized, and the pattern {key!r:.80} of quantization_config leaves it out.")
        if fits:
            found: Mapping[str, Any] = values
            return found
    return {}


PART = Gptq()
