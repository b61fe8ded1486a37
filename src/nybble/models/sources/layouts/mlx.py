"""MLX (mlx-lm's folders): integers over scales and biases, MXFP4, MXFP8, NVFP4; each row on words of its own.

=======  ===========================================================================================================
affine   ``weight`` uint32 [out, in * bits / 32], a little-endian stream of 1, 2, 3, 4, 5, 6 or 8 bits; ``scales`` and
         ``biases`` [out, in / group], in the model's dtype: x = scale * code + bias
mxfp4    ``weight`` as above, 4 bits of E2M1; ``scales`` uint8 [out, in / 32], exponents + 127; no biases
mxfp8    8 bits of E4M3, the same scales
nvfp4    4 bits of E2M1; ``scales`` uint8 [out, in / 16], bits of E4M3. Experts may have ``global_scale`` float32: the
         scales are multiplied by global_scale / (6 * 448)
=======  ===========================================================================================================
Experts of a layer are one tensor, ``switch_mlp.X_proj``, with a dimension in front. The key ``quantization`` of
config.json has group_size, bits and mode, and the same by module for those that differ; what it leaves open the shapes
say. Source: mlx 0.32 (``mx.quantize``), mlx-lm 0.32 (``utils.py: infer_quant_config``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import FileError, ModelError
from nybble.formats import get_format
from nybble.granularity import make_granularity
from nybble.models.sources.layouts import FLOATS, Files, Layout, PackedWeight
from nybble.models.sources.layouts._pieces import E2M1, E4M3, block, mx
from nybble.models.sources.layouts._rounded import Rounded, not_rounded
from nybble.qtensor import QTensor, QuantParams
from nybble.qtensor.block import BlockQTensor

BITS, GROUPS = (1, 2, 3, 4, 5, 6, 8), (32, 64, 128)
FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
"""Mode -> bits and group size, of which it has one pair."""
LARGEST = 6.0 * 448.0
ROLES = {"weight": "codes", "scales": "scales", "biases": "offsets", "global_scale": "scales"}
_EXPERTS = re.compile(r"(.*)\.switch_mlp\.(gate|up|down)_proj")


@dataclass(frozen=True)
class Packing:
    """How a module is packed: ``mode``, ``bits`` a code, ``group`` columns a scale."""

    mode: str
    bits: int
    group: int


class Mlx(Layout):
    """See the module."""

    def weights(self, config: Mapping[str, Any], files: Files) -> Iterator[PackedWeight]:  # noqa: D102
        experts: dict[str, list[str]] = {}
        for module in files.ending("scales"):
            found = _EXPERTS.fullmatch(module)
            if found is None:
                yield _weight(module, config, files)
            else:
                experts.setdefault(found[1], []).append(found[2])
        for place, leaves in experts.items():
            for leaf, wanted in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
                if any(name in leaves for name in wanted):
                    yield _experts(place, leaf, wanted, config, files)
        lost = [name for name, entry in files.entries.items() if entry.dtype == "U32" and not _has_scales(name, files)]
        if lost:
            raise FileError(f"{files.place}: {lost[0]} is packed, and no scales are beside it.")

    def rounded(self, config: Mapping[str, Any], files: Files, modules: Sequence[str]) -> Rounded:  # noqa: D102
        return Rounded(left=not_rounded(bool(config.get("quantize_activations")), False))


def _has_scales(name: str, files: Files) -> bool:
    return name.endswith(".weight") and f"{name.removesuffix('.weight')}.scales" in files.entries


def _weight(module: str, config: Mapping[str, Any], files: Files) -> PackedWeight:
    how, sizes = _sizes(module, config, files)
    if len(sizes) != 2:
        raise ModelError(
            f"{files.place}: {module}.weight has {len(sizes)} dimensions; matrices, and experts called switch_mlp, "
            "are read."
        )
    shape = (sizes[0], sizes[1])
    return PackedWeight(
        name=f"{module}.weight",
        shape=shape,
        parts={role: f"{module}.{role}" for role in _roles(module, files)},
        build=partial(_build, how=how, shape=shape),
        kept_as=ROLES,
    )


def _experts(place: str, leaf: str, wanted: tuple[str, ...], config: Mapping[str, Any], files: Files) -> PackedWeight:
    """A parameter of fused experts; of two projections it has the rows of the first and then those of the second."""
    modules = [f"{place}.switch_mlp.{name}_proj" for name in wanted]
    found = [_sizes(module, config, files) for module in modules]
    shapes = [sizes for _, sizes in found]
    same = {(sizes[0], sizes[-1]) for sizes in shapes}
    if any(len(sizes) != 3 for sizes in shapes) or len(same) > 1 or len({how for how, _ in found}) > 1:
        what = ", ".join(f"{m} {list(s)} {h.mode} of {h.bits}" for m, (h, s) in zip(modules, found, strict=True))
        raise FileError(f"{files.place}: experts that don't fit each other: {what} bits.")
    ((experts, columns),) = same
    if len({tuple(_roles(module, files)) for module in modules}) > 1:
        raise FileError(f"{files.place}: of {' and '.join(modules)} one alone has a global_scale.")
    parts = {f"{m}.{role}": f"{m}.{role}" for m in modules for role in _roles(m, files)}
    rows = [sizes[1] for sizes in shapes]
    if len(set(rows)) > 1:
        raise FileError(f"{files.place}: {' and '.join(modules)} have {' and '.join(map(str, rows))} outputs.")
    return PackedWeight(
        name=f"{place}.experts.{leaf}",
        shape=(experts, sum(rows), columns),
        parts=parts,
        build=partial(_build_experts, how=found[0][0], modules=modules, shape=(sum(rows), columns)),
        kept_as={part: ROLES[part.rpartition(".")[2]] for part in parts},
    )


def _roles(module: str, files: Files) -> list[str]:
    return [role for role in ROLES if f"{module}.{role}" in files.entries]


# --------------------------------------------------------------------------------------------------------- description
def _sizes(module: str, config: Mapping[str, Any], files: Files) -> tuple[Packing, tuple[int, ...]]:
    """How a module is packed, and the shape of its float weight; all its tensors fit each other."""
    *front, words = files.need(f"{module}.weight", ("U32",)).shape
    scales = files.need(f"{module}.scales", (*FLOATS, "U8"))
    if not front or not words or not all(front) or len(scales.shape) != len(front) + 1 or not scales.shape[-1]:
        raise FileError(
            f"{files.place}: {module}.weight {[*front, words]} and its scales {list(scales.shape)} are no matrix."
        )
    groups = scales.shape[-1]
    how = _packing(module, config, 32 * words / groups, scales.dtype == "U8", files.place)
    columns = groups * how.group
    if columns * how.bits != 32 * words:
        raise FileError(
            f"{files.place}: {module}.weight has {words} words a row; {groups} groups of {how.group} in {how.bits} "
            f"bits, as config.json says, are {columns * how.bits / 32:g}."
        )
    wanted = (*front, groups)
    files.need(f"{module}.scales", ("U8",) if how.mode != "affine" else FLOATS, wanted)
    if how.mode == "affine":
        files.need(f"{module}.biases", (scales.dtype,), wanted)
    elif f"{module}.biases" in files.entries:
        raise FileError(f"{files.place}: {module} is {how.mode}, which has no biases, and they are there.")
    if f"{module}.global_scale" in files.entries:
        if how.mode != "nvfp4" or len(front) != 2:
            raise FileError(f"{files.place}: {module}.global_scale; experts in nvfp4 alone have one.")
        files.need(f"{module}.global_scale", ("F32",), (front[0],))
    return how, (*front, columns)


def _packing(module: str, config: Mapping[str, Any], product: float, bytes_: bool, place: str) -> Packing:
    """What config.json says of a module; where that doesn't fit and doesn't name it, what its shapes leave.

    Args:
        module: its name.
        config: ``quantization``.
        product: bits times group size, by the shapes.
        bytes_: whether the scales are bytes.
        place: for messages.
    """
    named = config.get(module)
    if named is False:
        raise FileError(f"{place}: config.json says that {module} is in float, and it has scales.")
    if isinstance(named, dict):
        return _said({"mode": "affine", **named}, module, place)
    how = _said({"mode": "affine", **config}, "all modules", place)
    if (how.mode != "affine") == bytes_ and how.bits * how.group == product:
        return how
    modes = [Packing(mode, *pair) for mode, pair in FLOAT_MODES.items()]
    known = modes if bytes_ else [Packing("affine", bits, group) for bits in BITS for group in GROUPS]
    fits = [one for one in known if one.bits * one.group == product]
    if len(fits) == 1:
        return fits[0]
    raise FileError(
        f"{place}: {module} isn't {how.mode} of {how.bits} bits in groups of {how.group}, as config.json says of all "
        f"modules: it has {product:g} bits a scale. Its own bits and group_size are needed under {module!r:.80} there."
    )


def _said(config: Mapping[str, Any], what: str, place: str) -> Packing:
    mode = config["mode"]
    only = FLOAT_MODES.get(mode) if isinstance(mode, str) else None
    defaults = only or (4, 64)
    bits, group = config.get("bits"), config.get("group_size")
    bits, group = defaults[0] if bits is None else bits, defaults[1] if group is None else group
    legal = (bits, group) == only if only else mode == "affine" and bits in BITS and group in GROUPS
    if not legal or type(bits) is not int or type(group) is not int:
        raise FileError(
            f"{place}: config.json says mode {mode!r:.40}, bits {bits!r:.40}, group_size {group!r:.40} of {what:.80}; "
            f"MLX has affine of {', '.join(map(str, BITS))} bits in groups of 32, 64 or 128, and "
            f"{', '.join(f'{m} ({b} bits in groups of {g})' for m, (b, g) in FLOAT_MODES.items())}."
        )
    return Packing(mode, bits, group)


# ------------------------------------------------------------------------------------------------------------- tensors
def _build(t: Mapping[str, Tensor], *, how: Packing, shape: tuple[int, int]) -> list[QTensor]:
    return [made(t, how, shape)]


def made(t: Mapping[str, Tensor], how: Packing, shape: tuple[int, int]) -> BlockQTensor:
    """A matrix of a module's tensors, by role; of several global scales each is for as many rows."""
    codes = t["weight"].contiguous().view(torch.uint8).reshape(-1)
    if how.mode == "affine":
        found = block(f"uint{how.bits}", f"group={how.group}", shape, codes, t["scales"])
        params = QuantParams(found.params.scale, offset=t["biases"].contiguous())
        return BlockQTensor(found.format, found.granularity, shape, codes, params)
    if how.mode != "nvfp4":
        return mx(E2M1 if how.mode == "mxfp4" else E4M3, shape, codes, t["scales"])
    outer = t["global_scale"].reshape(-1, 1) / LARGEST if "global_scale" in t else None
    if outer is not None and bool((outer == outer[0]).all()):
        outer = outer[:1].clone()
    parts = 1 if outer is None else len(outer)
    kept = t["scales"].contiguous().view(torch.uint8).reshape(-1)
    count = (shape[0], shape[1] // how.group)
    shared = make_granularity("tensor" if parts == 1 else f"block={shape[0] // parts}x{count[1]}")
    inner = BlockQTensor(get_format(E4M3), shared, count, kept, QuantParams(outer))
    return BlockQTensor(get_format(E2M1), make_granularity("group=16"), shape, codes, QuantParams(inner))


def _build_experts(
    t: Mapping[str, Tensor], *, how: Packing, modules: list[str], shape: tuple[int, int]
) -> list[QTensor]:
    roles = [role for role in ROLES if f"{modules[0]}.{role}" in t]
    found: list[QTensor] = []
    for expert in range(len(t[f"{modules[0]}.weight"])):
        # not views: they would keep, and a file would hold, the tensors of all experts
        own = {role: torch.cat([_one(t[f"{module}.{role}"], expert) for module in modules]) for role in roles}
        found.append(made(own, how, shape))
    return found


def _one(stacked: Tensor, expert: int) -> Tensor:
    """An expert's own part, with memory of its own; of numbers [1]."""
    found = stacked[expert].clone()
    return found if found.ndim else found.reshape(1)


PART = Mlx()
