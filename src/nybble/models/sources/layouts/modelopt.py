"""NVIDIA ModelOpt: NVFP4, FP8, MXFP8, MXFP4 and INT8 weights; which one, a module's tensors say.

===========  =======================================================================================================
NVFP4        ``weight`` uint8 [out, in / 2]; ``weight_scale`` float8_e4m3fn [out, in / 16]; ``weight_scale_2`` float32:
             the scales are *multiplied* by it (compressed-tensors' ``weight_global_scale`` is its reciprocal)
MXFP4        ``weight`` uint8 [out, in / 2]; ``weight_scale`` uint8 [out, in / 32]
FP8, INT8    ``weight`` float8_e4m3fn or int8; ``weight_scale`` float32, one or one a row
MXFP8        ``weight`` float8_e4m3fn; ``weight_scale`` uint8 [out, in / 32]
===========  =======================================================================================================

Described by ``hf_quant_config.json``, or by config.json with ``quant_method`` modelopt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import FileError, ModelError
from nybble.models.sources.layouts import FLOATS, Files, Layout, PackedWeight
from nybble.models.sources.layouts._pieces import E2M1, E4M3, block, mx, nvfp4
from nybble.models.sources.layouts._rounded import Rounded, Side, not_rounded, ones
from nybble.qtensor import QTensor

ROLES = {"weight": "codes", "weight_scale": "scales", "weight_scale_2": "scales"}


class ModelOpt(Layout):
    """See the module."""

    def weights(self, config: Mapping[str, Any], files: Files) -> Iterator[PackedWeight]:  # noqa: D102
        said = config.get("quantization") or config
        algo = str(said.get("quant_algo"))
        smooth = next((name for name in files.entries if name.endswith(("pre_quant_scale", "svdquant_lora_a"))), None)
        if smooth is not None or algo in ("W4A16_AWQ", "W4A8_AWQ", "W4A8_NVFP4_FP8", "NVFP4_SVD"):
            why = f"has {smooth}" if smooth else f"is {algo}"
            raise ModelError(
                f"{files.place} {why}: inputs have to be scaled before the product, or four bits are packed down the "
                "outputs, which isn't read. NVFP4, FP8, MXFP8, MXFP4 and INT8 without smoothing are."
            )
        for module in dict.fromkeys([*files.ending("weight_scale"), *files.ending("weight_scale_2")]):
            yield _weight(module, files)

    def rounded(self, config: Mapping[str, Any], files: Files, modules: Sequence[str]) -> Rounded:  # noqa: D102
        said = config.get("quantization") or config
        algo = str(said.get("quant_algo"))
        inputs: dict[str, Side] = {}
        for module in modules:
            kept, scale = files.entries[f"{module}.weight"].dtype, f"{module}.input_scale"
            if kept == "F8_E4M3" and scale in files.entries and files.entries[f"{module}.weight_scale"].dtype != "U8":
                files.any_of(scale, FLOATS, ((), (1,)))
                inputs[module] = Side(line="float8_e4m3fn tensor static", scale=scale)
            elif algo == "FP8_PER_CHANNEL_PER_TOKEN":
                inputs[module] = Side(line="float8_e4m3fn token")
        cached = said.get("kv_cache_quant_algo") or said.get("kv_cache_scheme")
        scales = [name for name in files.entries if name.endswith((".k_scale", ".v_scale"))]
        fixed = cached and "FP8" in (cached if isinstance(cached, str) else str(cached.get("type"))) and scales
        kv = "float8_e4m3fn tensor scale=one" if fixed and ones(scales, files) else ""
        asks = "A16" not in algo and len(inputs) < len(modules)
        used = frozenset(n for n in files.entries if n.endswith((".input_scale", ".output_scale"))) | set(scales)
        return Rounded(inputs=inputs, kv=kv, used=used, left=not_rounded(asks, bool(cached) and not kv))


def _weight(module: str, files: Files) -> PackedWeight:
    rows, count = files.matrix(f"{module}.weight", ("U8", "F8_E4M3", "I8"))
    dtype = files.entries[f"{module}.weight"].dtype
    scale = files.need(f"{module}.weight_scale", (*FLOATS, "F8_E4M3", "U8"))
    parts = {role: f"{module}.{role}" for role in ("weight", "weight_scale")}
    shape = (rows, 2 * count if dtype == "U8" else count)
    if dtype == "U8" and scale.dtype == "F8_E4M3":
        _groups(module, shape, 16, files)
        files.any_of(f"{module}.weight_scale_2", ("F32",), ((), (1,)))
        parts["weight_scale_2"] = f"{module}.weight_scale_2"
        build = partial(_build_nvfp4, shape=shape)
    elif scale.dtype == "U8" and dtype != "I8":
        _groups(module, shape, 32, files)
        build = partial(_build_mx, shape=shape, fmt=E2M1 if dtype == "U8" else E4M3)
    else:
        if dtype == "U8":
            raise FileError(f"{files.place}: {module}.weight_scale is {scale.dtype}; of four bits it is F8_E4M3 or U8.")
        files.any_of(f"{module}.weight_scale", FLOATS, ((), (1,), (rows,), (rows, 1)))
        build = partial(_build_plain, shape=shape)
    return PackedWeight(name=f"{module}.weight", shape=shape, parts=parts, build=build, kept_as=ROLES)


def _groups(module: str, shape: tuple[int, int], size: int, files: Files) -> None:
    if shape[1] % size:
        raise FileError(f"{files.place}: {module} has {shape[1]} columns, which groups of {size} don't divide.")
    files.need(f"{module}.weight_scale", ("F8_E4M3", "U8"), (shape[0], shape[1] // size))


def _build_nvfp4(t: Mapping[str, Tensor], *, shape: tuple[int, int]) -> list[QTensor]:
    return [nvfp4(shape, t["weight"], t["weight_scale"], t["weight_scale_2"], divides=False)]


def _build_mx(t: Mapping[str, Tensor], *, shape: tuple[int, int], fmt: str) -> list[QTensor]:
    return [mx(fmt, shape, t["weight"], t["weight_scale"])]


def _build_plain(t: Mapping[str, Tensor], *, shape: tuple[int, int]) -> list[QTensor]:
    fmt = "int8_full" if t["weight"].dtype == torch.int8 else E4M3
    granularity = "tensor" if t["weight_scale"].numel() == 1 else "channel"
    return [block(fmt, granularity, shape, t["weight"].view(torch.uint8).reshape(-1), t["weight_scale"])]


PART = ModelOpt()
