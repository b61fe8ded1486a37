"""NVIDIA ModelOpt: NVFP4, FP8, MXFP8, MXFP4, INT8 and INT4 weights; which one, a module's tensors say.

===========  =======================================================================================================
NVFP4        ``weight`` uint8 [out, in / 2]; ``weight_scale`` float8_e4m3fn [out, in / 16] (or 32);
             ``weight_scale_2`` float32: the scales are *multiplied* by it (compressed-tensors'
             ``weight_global_scale`` is its reciprocal)
MXFP4        ``weight`` uint8 [out, in / 2]; ``weight_scale`` uint8 [out, in / 32]
FP8, INT8    ``weight`` float8_e4m3fn or int8; ``weight_scale`` float32, one or one a row; of FP8 also one for each
             128 x 128, [out / 128, 1, in / 128, 1]
MXFP8        ``weight`` float8_e4m3fn; ``weight_scale`` uint8 [out, in / 32]
INT4 (AWQ)   ``weight`` uint8 [out / 2, in], the first of two rows in the low nibble; ``weight_scale`` float32
             [out, in / group]
===========  =======================================================================================================

``pre_quant_scale`` [in] (SmoothQuant, AWQ) multiplies the inputs before the product; here it multiplies the columns of
the weight, which is the same but for the rounding of that product. Described by ``hf_quant_config.json``, or by
config.json with ``quant_method`` modelopt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import FileError, ModelError
from nybble.models.sources.layouts import FLOATS, Files, Layout, PackedWeight, whole
from nybble.models.sources.layouts._pieces import E2M1, E4M3, block, mx, nvfp4, packed
from nybble.models.sources.layouts._rounded import Rounded, Side, fixed_cache, not_rounded, nvfp4_side
from nybble.models.sources.layouts.compressed_tensors import group_of
from nybble.qtensor import QTensor
from nybble.qtensor.outer_scaled import OuterScaled

ROLES = {"weight": "codes", "weight_scale": "scales", "weight_scale_2": "scales", "pre_quant_scale": "scales"}
_MEASURED = {"FP8_PER_CHANNEL_PER_TOKEN": f"{E4M3} token", "MXFP8": "mxfp8 scale=pow2(mode=rceil)"}
_FIXED = {"FP8": E4M3, "W4A8_NVFP4_FP8": E4M3, "W4A8_MXFP4_FP8": E4M3, "W8A8_SQ_PER_CHANNEL": "int8_full"}
"""Algorithms that round inputs as nybble can: measured on every tensor, or by one scale for each module."""


class ModelOpt(Layout):
    """See the module."""

    def weights(self, config: Mapping[str, Any], files: Files) -> Iterator[PackedWeight]:  # noqa: D102
        said = config.get("quantization") or config
        algo = str(said.get("quant_algo"))
        lora = next((name for name in files.entries if name.endswith("svdquant_lora_a")), None)
        if lora is not None or algo in ("W4A8_AWQ", "NVFP4_SVD"):
            raise ModelError(
                f"{files.place} {f'has {lora}' if lora else f'is {algo}'}, which isn't read; NVFP4, FP8, MXFP8, MXFP4, "
                "INT8 and INT4 weights are."
            )
        for module in dict.fromkeys([*files.ending("weight_scale"), *files.ending("weight_scale_2")]):
            yield _weight(module, files, _stated_size(said, module))

    def rounded(self, config: Mapping[str, Any], files: Files, modules: Sequence[str]) -> Rounded:  # noqa: D102
        said = config.get("quantization") or config
        algos = {module: _algo(said, module) for module in modules}
        found = {module: _inputs(module, algo, files) for module, algo in algos.items()}
        inputs = {module: side for module, side in found.items() if side is not None}
        cached = said.get("kv_cache_quant_algo") or said.get("kv_cache_scheme")
        scales = [name for name in files.entries if name.endswith((".k_scale", ".v_scale"))]
        kv = fixed_cache(files, {"k_scale": ".k_proj", "v_scale": ".v_proj"}) if _is_fp8(cached) else ""
        why = ", of which k_scale or v_scale is missing" if _is_fp8(cached) and not kv else ""
        asks = any(module not in inputs and not _weights_alone(algo) for module, algo in algos.items())
        used = frozenset(n for n in files.entries if n.endswith((".input_scale", ".output_scale"))) | set(scales)
        return Rounded(inputs=inputs, kv=kv, used=used, left=not_rounded(asks, bool(cached) and not kv, why))


def _is_fp8(cached: object) -> bool:
    """Whether a KV cache is E4M3, by hf_quant_config.json's word or config.json's; where no scale is, it is 1."""
    if isinstance(cached, Mapping):
        return cached.get("type") == "float" and cached.get("num_bits") == 8
    return cached == "FP8"


def _algo(said: Mapping[str, Any], module: str) -> str:
    """Of a module: its own, where a checkpoint has several."""
    layers = said.get("quantized_layers") or {}
    return str(layers.get(module, said).get("quant_algo"))


def _stated_size(said: Mapping[str, Any], module: str) -> int | None:
    """The ``group_size`` of a module's weight, where the checkpoint says it."""
    layers = said.get("quantized_layers") or {}
    found = layers.get(module, {} if layers else said).get("group_size")
    if found is None and said.get("config_groups"):
        found = ((group_of(module, said) or {}).get("weights") or {}).get("group_size")
    return None if found is None else whole(found, 1, 1 << 30, f"group_size of {module}")


def _weights_alone(algo: str) -> bool:
    """Whether an algorithm leaves the inputs in float: W4A16_AWQ, W8A16, fp8_pb_wo."""
    return "A16" in algo or algo.lower().endswith("_wo")


def _inputs(module: str, algo: str, files: Files) -> Side | None:
    """What rounds the inputs; None where no quantizer says it (inputs that are multiplied first)."""
    scale = f"{module}.input_scale"
    if f"{module}.pre_quant_scale" in files.entries:
        return None
    if algo in _MEASURED:
        return Side(line=_MEASURED[algo])
    if algo == "NVFP4":
        return nvfp4_side(scale, "factor", files)
    kept, above = (files.entries[f"{module}.{leaf}"].dtype for leaf in ("weight", "weight_scale"))
    word = _FIXED.get(algo, E4M3 if kept == "F8_E4M3" and above != "U8" else "")
    if not word or scale not in files.entries:
        return None
    files.any_of(scale, FLOATS, ((), (1,)))
    return Side(line=f"{word} tensor static", scale=scale)


def _weight(module: str, files: Files, stated: int | None) -> PackedWeight:
    rows, count = files.matrix(f"{module}.weight", ("U8", "F8_E4M3", "I8"))
    dtype = files.entries[f"{module}.weight"].dtype
    scale = files.need(f"{module}.weight_scale", (*FLOATS, "F8_E4M3", "U8"))
    parts = {role: f"{module}.{role}" for role in ("weight", "weight_scale")}
    shape = (rows, 2 * count if dtype == "U8" else count)
    build: Callable[[Mapping[str, Tensor]], list[QTensor]]
    if dtype == "U8" and scale.dtype == "F8_E4M3":
        size = _groups(module, shape, (16, 32), files, stated)
        files.any_of(f"{module}.weight_scale_2", ("F32",), ((), (1,)))
        parts["weight_scale_2"] = f"{module}.weight_scale_2"
        build = partial(_build_nvfp4, shape=shape, size=size)
    elif scale.dtype == "U8" and dtype != "I8":
        _groups(module, shape, (32,), files, stated)
        build = partial(_build_mx, shape=shape, fmt=E2M1 if dtype == "U8" else E4M3)
    elif dtype == "U8":
        shape = (2 * rows, count)
        build = partial(_build_int4, shape=shape, size=_groups(module, shape, (), files, stated))
    else:
        tiles = ((rows // 128, 1, count // 128, 1),) if rows % 128 == count % 128 == 0 and dtype != "I8" else ()
        files.any_of(f"{module}.weight_scale", FLOATS, ((), (1,), (rows,), (rows, 1), *tiles))
        build = partial(_build_plain, shape=shape)
    smooth = f"{module}.pre_quant_scale"
    if smooth in files.entries:
        files.any_of(smooth, FLOATS, ((shape[1],), (1, shape[1])))
        parts["pre_quant_scale"] = smooth
        build = partial(_smoothed, build)
    return PackedWeight(name=f"{module}.weight", shape=shape, parts=parts, build=build, kept_as=ROLES)


def _groups(module: str, shape: tuple[int, int], sizes: Sequence[int], files: Files, stated: int | None) -> int:
    """Columns that share a scale.

    Args:
        module: whose.
        shape: of its weight.
        sizes: that there may be; none: any.
        files: what is there.
        stated: what the config says, if anything.

    Raises:
        FileError: a scale of another shape, or of groups of another size than is stated.
    """
    found = files.need(f"{module}.weight_scale", (*FLOATS, "F8_E4M3", "U8")).shape
    count = found[1] if len(found) == 2 and found[0] == shape[0] else 0
    size = shape[1] // count if count and shape[1] % count == 0 else 0
    if not size or (sizes and size not in sizes):
        wanted = " or ".join(map(str, sizes)) or "one size"
        raise FileError(
            f"{files.place}: {module}.weight_scale is {list(found)}; a weight {list(shape)} in groups of {wanted} "
            "needs another."
        )
    if stated is not None and size != min(stated, shape[1]):
        raise FileError(
            f"{files.place}: the config says group_size {stated}, and {module}.weight_scale {list(found)} is of groups "
            f"of {size} in a weight {list(shape)}. One of the two is wrong."
        )
    return size


def _smoothed(build: Callable[[Mapping[str, Tensor]], list[QTensor]], t: Mapping[str, Tensor]) -> list[QTensor]:
    (found,) = build(t)
    return [OuterScaled(found, (t["pre_quant_scale"].reshape(1, -1),))]


def _build_nvfp4(t: Mapping[str, Tensor], *, shape: tuple[int, int], size: int) -> list[QTensor]:
    return [nvfp4(shape, t["weight"], t["weight_scale"], t["weight_scale_2"], divides=False, size=size)]


def _build_int4(t: Mapping[str, Tensor], *, shape: tuple[int, int], size: int) -> list[QTensor]:
    codes = torch.stack([t["weight"] & 15, t["weight"] >> 4], 1)
    word = "channel" if size == shape[1] else f"group={size}"
    return [block("int4_full", word, shape, packed(codes, 4), t["weight_scale"])]


def _build_mx(t: Mapping[str, Tensor], *, shape: tuple[int, int], fmt: str) -> list[QTensor]:
    return [mx(fmt, shape, t["weight"], t["weight_scale"])]


def _build_plain(t: Mapping[str, Tensor], *, shape: tuple[int, int]) -> list[QTensor]:
    fmt = "int8_full" if t["weight"].dtype == torch.int8 else E4M3
    tiles = "block=128x128" if t["weight_scale"].dim() == 4 else "channel"
    granularity = "tensor" if t["weight_scale"].numel() == 1 else tiles
    return [block(fmt, granularity, shape, t["weight"].view(torch.uint8).reshape(-1), t["weight_scale"])]


PART = ModelOpt()
