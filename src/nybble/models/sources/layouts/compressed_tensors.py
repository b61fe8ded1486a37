"""compressed-tensors (llm-compressor, vLLM): its formats of quantized weights, mixed ones too.

``config_groups`` say which modules have which QuantizationArgs; a module's tensors are named beside it:

=======================  ==========================================================================================
pack-quantized           ``weight_packed`` int32 (offset binary, a little-endian stream a row), ``weight_scale``,
                         ``weight_shape`` int64 [2]; ``weight_zero_point`` packed down its columns (int8 for a tensor
                         or blocks); ``weight_g_idx`` where older versions reordered columns
int-, float-,            ``weight`` int8 or float8_e4m3fn, ``weight_scale``, ``weight_zero_point`` int8
naive-quantized
nvfp4-pack-quantized     ``weight_packed`` uint8, ``weight_scale`` float8_e4m3fn, ``weight_global_scale`` float32 [1]: a
                         divisor
mxfp4-, mxfp6-pack-,     ``weight_packed`` uint8 (``weight`` float8_e4m3fn of mxfp8), ``weight_scale`` uint8 exponents
mxfp8-quantized
=======================  ==========================================================================================

Where ``quantization_status`` is ``decompressed``, the library had unpacked them (transformers has it do so at a model's
first forward) before they were saved: ``weight`` is in float, and the scales beside it are of no use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import FileError, ModelError
from nybble.models.sources.layouts import FLOATS, Files, Layout, PackedWeight, whole, words
from nybble.models.sources.layouts._ct_rotations import Rotations
from nybble.models.sources.layouts._patterns import is_class, named
from nybble.models.sources.layouts._pieces import (
    E2M1,
    E4M3,
    block,
    flipped,
    in_order,
    integers,
    mx,
    nvfp4,
    packed,
    reordered,
    signed_codes,
    stream_rows,
)
from nybble.models.sources.layouts._rounded import (
    Rounded,
    Side,
    dynamic_line,
    fixed_cache,
    not_rounded,
    nvfp4_side,
    static_side,
)
from nybble.qtensor import QTensor

Args = Mapping[str, Any]
Build = Callable[[Mapping[str, Tensor]], Sequence[QTensor]]
ROLES = {
    "weight": "codes", "weight_packed": "codes", "weight_scale": "scales", "weight_global_scale": "scales",
    "weight_zero_point": "offsets", "weight_shape": "tables", "weight_g_idx": "tables",
}  # fmt: skip
_PLAIN = ("int-quantized", "float-quantized", "naive-quantized")
_MX = {"mxfp4-pack-quantized": (E2M1, 4), "mxfp6-pack-quantized": ("float6_e2m3fn", 6), "mxfp8-quantized": (E4M3, 8)}
SIDES = {"input_activations": "input", "output_activations": "output"}
BESIDE = frozenset(
    f"{side}_{what}" for side in ("input", "output", "k", "v", "q") for what in ("scale", "zero_point", "global_scale")
)
"""Tensors that say how something else than a weight is rounded."""
FORMATS = ("pack-quantized", *_PLAIN, "nvfp4-pack-quantized", *_MX)


_CALIBRATED = ", by numbers that were calibrated over scales or tokens"
_SAVED = (
    "The weights are in float, as they were rounded: transformers has compressed-tensors unpack them at a model's "
    "first forward, and then saves them so. The folder from which it was loaded has them packed."
)


class CompressedTensors(Layout):
    """See the module."""

    def weights(self, config: Mapping[str, Any], files: Files) -> Iterator[PackedWeight]:  # noqa: D102
        groups, rotations, packed = _groups(config), Rotations(config, files), set[str]()
        for name in dict.fromkeys([*files.ending("weight_packed"), *files.ending("weight_scale")]):
            form, args = _chosen(name, groups)
            if form == "dense":
                continue
            if form not in FORMATS:
                raise ModelError(f"{files.place}: {name} has the format {form!r:.60}; readable: {', '.join(FORMATS)}.")
            weight = _weight(name, form, args, files)
            packed.add(name)
            yield replace(weight, rotation=rotations.of(name, weight.shape[1]))
        rotations.check_float(packed, [str(target) for target in config.get("ignore") or ()])

    def in_float(self, config: Mapping[str, Any]) -> bool:
        """Of the format ``dense``, and of a model saved unpacked, weights are rounded, and kept in float."""
        return all(form == "dense" for form, _, _ in _groups(config))

    def rounded(self, config: Mapping[str, Any], files: Files, modules: Sequence[str]) -> Rounded:  # noqa: D102
        named = {side: _sides(config, side) for side in SIDES}
        found: dict[str, dict[str, Side]] = {side: {} for side in SIDES}
        lost = False
        for side, word in SIDES.items():
            for module in modules if named[side] else ():
                args = _chosen(module, named[side], f"{side} of {module}")[1]
                made = _side(module, word, args, files) if args else None
                lost |= bool(args) and made is None
                if made is not None:
                    found[side][module] = made
        kv, cached = _cache(config.get("kv_cache_scheme"), files)
        unpacked, cache = _unpacked(config), cached and not kv
        asked = any(args for groups in named.values() for _, _, args in groups)
        beside = BESIDE | (ROLES.keys() - {"weight", "weight_packed"} if unpacked else set())
        used = {n for n in files.entries if n.rpartition(".")[2] in beside}
        return Rounded(
            matrices=frozenset(Rotations(config, files).matrices),
            inputs=found["input_activations"], outputs=found["output_activations"], kv=kv, used=frozenset(used),
            left=f"{_SAVED} {not_rounded(asked, cache)}".strip() if unpacked else not_rounded(lost, cache, _CALIBRATED),
        )  # fmt: skip


def _sides(config: Mapping[str, Any], side: str) -> list[tuple[str, list[str], Args]]:
    """As :func:`_groups`, of activations; none where no group has any."""
    groups = [group for group in config["config_groups"].values() if group.get("weights") is not None]
    if not any(group.get(side) for group in groups):
        return []
    return [("", [str(target) for target in group["targets"]], group.get(side) or {}) for group in groups]


def _side(module: str, word: str, args: Args, files: Files) -> Side | None:
    dynamic = args.get("dynamic", False)
    if dynamic is True:
        line = dynamic_line(args, module)
        return None if line is None else Side(line=line)
    if dynamic == "local":
        return nvfp4_side(f"{module}.{word}_global_scale", "divisor", files) if _is_nvfp4(args) else None
    return static_side(module, word, args, files) if dynamic is False else None


def _is_nvfp4(args: Args) -> bool:
    said = (args.get("type"), args.get("num_bits"), args.get("strategy"), args.get("group_size"))
    inner = args.get("scale_dtype") in (None, "torch.float8_e4m3fn")
    return said == ("float", 4, "tensor_group", 16) and inner and bool(args.get("symmetric", True))


def _cache(args: Args | None, files: Files) -> tuple[str | dict[str, str], bool]:
    """The line of a KV cache, or lines by attention, where nybble has one; and whether any is asked for."""
    if not args:
        return "", False
    if args.get("dynamic", False) is True:
        line = dynamic_line(args, "kv_cache_scheme")
        return (line or "") if line is None or " tensor" not in line else "", True
    scales = [name for name in files.entries if name.endswith((".k_scale", ".v_scale"))]
    fixed = args.get("type") == "float" and args.get("num_bits", 8) == 8 and args.get("strategy") in ("tensor", None)
    return fixed_cache(files, {"k_scale": "", "v_scale": ""}) if fixed and scales else "", True


def group_of(name: str, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What ``config_groups`` say of a module; None where it stays in float.

    Args:
        name: of a linear layer, or of an embedding that is named.
        config: ``quantization_config``.
    """
    if any(named(name, str(target)) for target in config.get("ignore") or ()):
        return None
    groups = [(group, [str(target) for target in group["targets"]]) for group in config["config_groups"].values()]
    for group, targets in groups:
        if any(named(name, target) for target in targets):
            return dict(group)
    return next((dict(group) for group, targets in groups if any(map(is_class, targets))), None)


def _unpacked(config: Mapping[str, Any]) -> bool:
    return config.get("quantization_status") == "decompressed"


def _groups(config: Mapping[str, Any]) -> list[tuple[str, list[str], Args]]:
    """(format, targets, QuantizationArgs of weights) of each group that has any."""
    found: list[tuple[str, list[str], Args]] = []
    for group in config["config_groups"].values():
        args = group.get("weights")
        if args is not None:
            form = group.get("format") or config.get("format")
            form = "dense" if _unpacked(config) else form
            if not isinstance(form, str) or not isinstance(args, dict):
                raise FileError(f"a group of quantization_config has format {form!r:.40} and weights {args!r:.40}.")
            found.append((form, [str(target) for target in group["targets"]], args))
    return found


def _chosen(name: str, groups: list[tuple[str, list[str], Args]], what: str = "") -> tuple[str, Args]:
    """The format and args of a module: a group that names it goes before one that names its class."""
    for form, targets, args in groups:
        if any(named(name, target) for target in targets):
            return form, args
    for form, targets, args in groups:
        if any(map(is_class, targets)):
            return form, args
    raise FileError(f"{what or name} is quantized, and no group of quantization_config is for it.")


def _weight(name: str, form: str, args: Args, files: Files) -> PackedWeight:
    if form == "pack-quantized":
        parts, shape, build = _packed_integers(name, args, files)
    elif form in _PLAIN:
        parts, shape, build = _plain(name, args, files)
    else:
        parts, shape, build = _blocks(name, form, args, files)
    return PackedWeight(
        name=f"{name}.weight",
        shape=shape,
        parts={part: f"{name}.{part}" for part in parts},
        build=build,
        kept_as=ROLES,
        form=form,
    )


Found = tuple[list[str], tuple[int, int], Build]


def _packed_integers(name: str, args: Args, files: Files) -> Found:
    bits = _integer(name, args)
    rows, count = files.matrix(f"{name}.weight_packed", ("I32",))
    files.need(f"{name}.weight_shape", ("I64", "I32"), (2,))
    shape = tuple(int(n) for n in files.small(f"{name}.weight_shape"))
    if shape[0] != rows or shape[1] < 1 or words(shape[1], bits) != count:
        raise FileError(
            f"{files.place}: {name}.weight_shape says {list(shape)}, and {name}.weight_packed is [{rows}, {count}] "
            f"words of {bits}-bit codes."
        )
    parts = ["weight_packed", "weight_scale", "weight_shape"]
    found = (rows, shape[1])
    granularity, scales = _shared(name, args, found)
    files.any_of(f"{name}.weight_scale", FLOATS, _spellings(scales))
    if not args.get("symmetric", True):
        parts.append("weight_zero_point")
        if args.get("strategy") in ("group", "channel"):
            files.need(f"{name}.weight_zero_point", ("I32",), (words(rows, bits), scales[1]))
        else:
            files.any_of(f"{name}.weight_zero_point", ("I8",), _spellings(scales))
    if f"{name}.weight_g_idx" in files.entries:
        files.need(f"{name}.weight_g_idx", ("I32", "I64"), (found[1],))
        parts.append("weight_g_idx")
    return parts, found, partial(_build_integers, bits=bits, shape=found, granularity=granularity, scales=scales)


def _build_integers(
    t: Mapping[str, Tensor], *, bits: int, shape: tuple[int, int], granularity: str, scales: tuple[int, int]
) -> list[QTensor]:
    half, codes = 1 << (bits - 1), t["weight_packed"]
    plain = codes.shape[1] * 32 == shape[1] * bits and "weight_g_idx" not in t  # rows follow each other without a gap
    codes = codes if plain else stream_rows(codes, bits, shape[1]) ^ half
    order = None
    if "weight_g_idx" in t and bool((t["weight_g_idx"] >= 0).all()):  # -1: not reordered
        order = in_order(t["weight_g_idx"], shape[1] // scales[1])
        codes = codes if order is None else codes[:, order.long()]
    zero: QTensor | None = None
    if "weight_zero_point" in t:
        stored = t["weight_zero_point"]
        if stored.dtype == torch.int32:
            points = stream_rows(stored.T.contiguous(), bits, scales[0]).T ^ half
        else:
            points = signed_codes(stored.reshape(scales), bits)
        zero = integers(points, f"int{bits}_full")
    kept = flipped(codes.reshape(-1).view(torch.uint8), bits) if plain else packed(codes, bits)
    found = block(f"int{bits}_full", granularity, shape, kept, t["weight_scale"], zero)
    return [reordered(found, order)]


def _plain(name: str, args: Args, files: Files) -> Found:
    is_float = args.get("type") == "float"
    shape = files.matrix(f"{name}.weight", ("F8_E4M3",) if is_float else ("I8",))
    bits = 8 if is_float else _integer(name, args)
    granularity, scales = _shared(name, args, shape)
    files.any_of(f"{name}.weight_scale", FLOATS, _spellings(scales))
    parts = ["weight", "weight_scale"]
    if not args.get("symmetric", True):
        if is_float:
            raise FileError(f"{name} is said to have zero points in {E4M3}.")
        files.any_of(f"{name}.weight_zero_point", ("I8",), _spellings(scales))
        parts.append("weight_zero_point")
    return parts, shape, partial(_build_plain, bits=bits, shape=shape, granularity=granularity, scales=scales)


def _build_plain(
    t: Mapping[str, Tensor], *, bits: int, shape: tuple[int, int], granularity: str, scales: tuple[int, int]
) -> list[QTensor]:
    if t["weight"].dtype != torch.int8:
        return [block(E4M3, granularity, shape, t["weight"].view(torch.uint8).reshape(-1), t["weight_scale"])]
    zero: QTensor | None = None
    if "weight_zero_point" in t:
        zero = integers(signed_codes(t["weight_zero_point"].reshape(scales), bits), f"int{bits}_full")
    codes = packed(signed_codes(t["weight"], bits), bits)
    return [block(f"int{bits}_full", granularity, shape, codes, t["weight_scale"], zero)]


def _blocks(name: str, form: str, args: Args, files: Files) -> Found:
    """NVFP4 and the MX formats."""
    if not args.get("symmetric", True):
        raise FileError(f"{name} is said to have zero points in {form}.")
    if form.startswith("nv"):
        rows, half = files.matrix(f"{name}.weight_packed", ("U8",))
        shape = (rows, 2 * half)
        size = _block_size(name, args, 16, shape, files)
        files.need(f"{name}.weight_scale", ("F8_E4M3",))
        files.any_of(f"{name}.weight_global_scale", ("F32",), ((1,), ()))
        parts = ["weight_packed", "weight_scale", "weight_global_scale"]
        return parts, shape, partial(_build_nvfp4, shape=shape, size=size)
    fmt, bits = _MX[form]
    codes = "weight" if bits == 8 else "weight_packed"
    rows, count = files.matrix(f"{name}.{codes}", ("F8_E4M3",) if bits == 8 else ("U8",))
    shape = (rows, count * 8 // bits)
    if count * 8 % bits:
        raise FileError(
            f"{files.place}: {name}.{codes} has rows of {count} bytes, which codes of {bits} bits don't fill."
        )
    if (size := _block_size(name, args, 32, shape, files)) != 32:
        raise ModelError(f"{files.place}: {name} has {form} in groups of {size}; of the MX formats 32 is read.")
    files.need(f"{name}.weight_scale", ("U8", "F8_E8M0"))
    return [codes, "weight_scale"], shape, partial(_build_mx, codes=codes, fmt=fmt, shape=shape)


def _block_size(name: str, args: Args, usual: int, shape: tuple[int, int], files: Files) -> int:
    """Columns under one scale, as the config says; the format's ``usual`` where it says nothing.

    Raises:
        FileError: they don't divide the columns, or the scales are those of another size.
    """
    said = args.get("group_size")
    size = _dividing(name, shape, whole(usual if said is None else said, 1, shape[1], f"group_size of {name}"))
    found = files.matrix(f"{name}.weight_scale", ("F8_E4M3", "U8", "F8_E8M0"))
    if found != (shape[0], shape[1] // size):
        stated = "it has groups" if said is None else "quantization_config says group_size"
        raise FileError(
            f"{files.place}: {stated} {size}, with which {name} [{shape[0]}, {shape[1]}] has scales "
            f"[{shape[0]}, {shape[1] // size}]; weight_scale is {list(found)}. One of the two is wrong."
        )
    return size


def _build_nvfp4(t: Mapping[str, Tensor], *, shape: tuple[int, int], size: int) -> list[QTensor]:
    return [nvfp4(shape, t["weight_packed"], t["weight_scale"], t["weight_global_scale"], divides=True, size=size)]


def _build_mx(t: Mapping[str, Tensor], *, codes: str, fmt: str, shape: tuple[int, int]) -> list[QTensor]:
    return [mx(fmt, shape, t[codes], t["weight_scale"])]


def _integer(name: str, args: Args) -> int:
    if args.get("type", "int") != "int":
        raise FileError(f"{name}: integers are stored, and quantization_config says type {args.get('type')!r:.40}.")
    return whole(args.get("num_bits", 8), 1, 8, f"num_bits of {name}")


def _shared(name: str, args: Args, shape: tuple[int, int]) -> tuple[str, tuple[int, int]]:
    """The granularity that a strategy is, and the shape of its scales."""
    rows, columns = shape
    found = args.get("strategy")
    if found == "tensor" or (found is None and args.get("group_size") is None):
        return "tensor", (1, 1)
    if found == "channel":
        return "channel", (rows, 1)
    if found in ("group", None):
        size = whole(args.get("group_size"), -1, columns, f"group_size of {name}")
        if size < 1:
            return "channel", (rows, 1)
        return f"group={_dividing(name, shape, size)}", (rows, columns // size)
    if found == "block":
        high, wide = (whole(n, 1, 1 << 20, f"block_structure of {name}") for n in args["block_structure"])
        if rows % high or columns % wide:
            raise ModelError(f"{name} is {rows} x {columns} in blocks of {high} x {wide}, and the last ones are short.")
        return f"block={high}x{wide}", (rows // high, columns // wide)
    raise ModelError(f"{name}: nybble knows no weights that share scales by {found!r:.40}.")


def _dividing(name: str, shape: tuple[int, int], size: int) -> int:
    if shape[1] % size:
        raise FileError(f"{name} has {shape[1]} columns, and groups of {size} don't divide them.")
    return size


def _spellings(scales: tuple[int, int]) -> list[tuple[int, ...]]:
    """Shapes in which versions of the library wrote scales."""
    rows, columns = scales
    found: list[tuple[int, ...]] = [scales]
    if columns == 1:
        found.append((rows,))
    return [*found, ()] if scales == (1, 1) else found


PART = CompressedTensors()
