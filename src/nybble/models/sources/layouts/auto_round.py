"""auto-round's own folders: integers in GPTQ's or AWQ's words, and MXFP4 as llm-compressor has it.

``packing_format`` says which. With awq in it: AWQ's. With gptq in it, gptqmodel apart: GPTQ's, zero points less one.
Else GPTQ's, zero points as they are. ``extra_config`` gives modules, by name or by a pattern of names, bits and sizes
of their own. ``data_type`` mx_fp: ``weight_packed`` uint8, ``weight_scale`` uint8 exponents.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from nybble.core.errors import FileError, ModelError
from nybble.models.sources.layouts import Files, Layout, PackedWeight, whole
from nybble.models.sources.layouts._patterns import compiled
from nybble.models.sources.layouts._pieces import E2M1, mx
from nybble.models.sources.layouts._rounded import Rounded, Side, dynamic_line, not_rounded
from nybble.models.sources.layouts._words import Words, awq_weight, gptq_weight
from nybble.qtensor import QTensor


class AutoRound(Layout):
    """See the module."""

    def weights(self, config: Mapping[str, Any], files: Files) -> Iterator[PackedWeight]:  # noqa: D102
        form, kind = str(config.get("packing_format") or "auto_round"), str(config.get("data_type") or "int")
        bits = config.get("bits")
        if kind not in ("int", "mx_fp") or (kind == "mx_fp" and bits != 4):
            raise ModelError(
                f"{files.place} is by auto-round in {kind!r:.20} of {bits!r:.20} bits; int and mx_fp of 4 bits are "
                "read. Export it as llm_compressor: auto-round --format llm_compressor."
            )
        if kind == "mx_fp":
            for module in files.ending("weight_packed"):
                yield _mx(module, files)
            return
        for module in files.ending("qweight"):
            yield _integers(module, form, {**config, **_own(module, config.get("extra_config") or {})}, files)

    def rounded(self, config: Mapping[str, Any], files: Files, modules: Sequence[str]) -> Rounded:  # noqa: D102
        line = dynamic_line({**_MX_INPUTS, "num_bits": config["act_bits"]}, "act_bits") if _rounds_mx(config) else None
        asks = type(config.get("act_bits")) is int and config["act_bits"] < 16
        inputs = {} if line is None else {module: Side(line=line) for module in modules}
        return Rounded(inputs=inputs, left=not_rounded(asks and line is None, False))


_MX_INPUTS = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "dynamic": True}


def _rounds_mx(config: Mapping[str, Any]) -> bool:
    """Whether inputs are measured in groups of 32 under powers of two."""
    said = [config.get(f"act_{word}") for word in ("data_type", "group_size", "dynamic")]
    return said == ["mx_fp", 32, True] and config.get("act_bits") in (4, 8)


def _integers(module: str, form: str, said: Mapping[str, Any], files: Files) -> PackedWeight:
    size = whole(said.get("group_size", 128), -1, 1 << 30, f"group_size of {module}")
    if "awq" in form:
        return awq_weight(module, Words(bits=whole(said.get("bits"), 4, 7, f"bits of {module}"), size=size), files)
    less = int("gptq" in form and "gptqmodel" not in form)
    bits = whole(said.get("bits"), 2, 8, f"bits of {module}")
    return gptq_weight(module, Words(bits=bits, size=size, less=less), files)


def _own(module: str, extra: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is said of a module by its name, else by the first pattern that is found in it."""
    patterns = [key for key in extra if re.search(r"[*+?^$()\[\]\\|]", key)]
    named = module if module in extra else next((key for key in patterns if compiled(key).search(module)), None)
    found: Mapping[str, Any] = {} if named is None else extra[named]
    return found


def _mx(module: str, files: Files) -> PackedWeight:
    rows, half = files.matrix(f"{module}.weight_packed", ("U8",))
    shape = (rows, 2 * half)
    if shape[1] % 32:
        raise FileError(f"{files.place}: {module} has {shape[1]} columns, which groups of 32 don't divide.")
    files.need(f"{module}.weight_scale", ("U8",), (rows, shape[1] // 32))
    parts = {role: f"{module}.{role}" for role in ("weight_packed", "weight_scale")}
    return PackedWeight(
        name=f"{module}.weight", shape=shape, parts=parts, build=partial(_build_mx, shape=shape),
        kept_as={"weight_packed": "codes", "weight_scale": "scales"},
    )  # fmt: skip


def _build_mx(t: Mapping[str, Tensor], *, shape: tuple[int, int]) -> list[QTensor]:
    return [mx(E2M1, shape, t["weight_packed"], t["weight_scale"])]


PART = AutoRound()
