"""bitsandbytes: NF4 and FP4 in blocks, their scales nested or not, and LLM.int8's rows.

=====  =============================================================================================================
4-bit  ``weight`` uint8 [n / 2, 1], the *first* of two codes in the high nibble; ``weight.absmax`` a block;
       ``weight.quant_map`` float32 [16]; ``weight.quant_state.bitsandbytes__nf4``, JSON as bytes. Nested: absmax is
       uint8, under ``weight.nested_absmax``, ``weight.nested_quant_map`` float32 [256], and a mean
8-bit  ``weight`` int8 [out, in], ``SCB`` float32 [out]: the largest magnitude of a row; x = code * SCB / 127
=====  =============================================================================================================
Blocks of four bits run on from row to row, as the library's generic code has them (its GPU kernels were not tried);
its CPU kernel (0.50.2) reads rows that are no multiple of a block otherwise, and twice as far from the weights that
were quantized.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import FileError, ModelError
from nybble.formats import get_format
from nybble.granularity import make_granularity
from nybble.models.sources.layouts import Files, Layout, PackedWeight, whole
from nybble.models.sources.layouts._pieces import block
from nybble.models.sources.layouts._rounded import Rounded
from nybble.qtensor import QTensor, QuantParams
from nybble.qtensor.block import BlockQTensor
from nybble.qtensor.outer_scaled import OuterScaled

_STATE = ".quant_state.bitsandbytes__"
_FORMATS = {"nf4": "nf4", "fp4": "fp4_bnb"}
_INVERSE_127 = 7.874015718698502e-3
"""What the library multiplies by, as it writes it; in float32 not 1 / 127."""
ROLES = {
    "weight": "codes", "absmax": "scales", "quant_map": "tables", "nested_absmax": "scales",
    "nested_quant_map": "tables", "state": "tables", "SCB": "scales", "weight_format": "tables",
}  # fmt: skip


class BitsAndBytes(Layout):
    """See the module."""

    def weights(self, config: Mapping[str, Any], files: Files) -> Iterator[PackedWeight]:  # noqa: D102
        for name in files.entries:
            if _STATE in name:
                weight, _, kind = name.partition(_STATE)
                yield _four_bits(weight, kind, files)
        for module in files.ending("SCB"):
            yield _eight_bits(module, files)
        packed = [m for m in files.ending("weight") if files.entries[f"{m}.weight"].dtype == "U8"]
        lost = [m for m in packed if not any(f"{m}.weight{_STATE}{kind}" in files.entries for kind in _FORMATS)]
        if lost:
            raise FileError(f"{files.place}: {lost[0]}.weight is packed, and no quant_state is beside it.")

    def rounded(self, config: Mapping[str, Any], files: Files, modules: Sequence[str]) -> Rounded:  # noqa: D102
        line = "LLM.int8 rounds activations too; here they stay in float."
        return Rounded(left=line if config.get("load_in_8bit") else "")


def _four_bits(name: str, kind: str, files: Files) -> PackedWeight:
    record = f"{name}{_STATE}{kind}"
    if kind not in _FORMATS:
        raise ModelError(f"{files.place}: {name} is of the type {kind!r:.40}; bitsandbytes has {', '.join(_FORMATS)}.")
    files.need(record, ("U8",))
    state = json.loads(bytes(files.small(record).tolist()))
    sizes = [whole(n, 1, 1 << 40, f"a size in {record}") for n in state["shape"]]
    if len(sizes) != 2:
        raise ModelError(f"{files.place}: {name} has shape {sizes}; matrices alone are read.")
    shape = (sizes[0], sizes[1])
    size = whole(state["blocksize"], 1, 1 << 30, f"blocksize in {record}")
    count = math.prod(shape)
    blocks = math.ceil(count / size)
    if files.need(name, ("U8", "I8", "F16", "BF16", "F32")).nbytes != math.ceil(count / 2):  # any quant_storage
        raise FileError(f"{files.place}: {name} has {files.entries[name].nbytes} bytes for {sizes} in four bits.")
    files.need(f"{name}.quant_map", ("F32",), (16,))
    nested = f"{name}.nested_absmax" in files.entries
    files.need(f"{name}.absmax", ("U8",) if nested else ("F32",), (blocks,))
    parts = {"weight": name, "state": record, **{p: f"{name}.{p}" for p in ("absmax", "quant_map")}}
    inner, mean = 0, 0.0
    if nested:
        inner = whole(state["nested_blocksize"], 1, 1 << 30, f"nested_blocksize in {record}")
        mean = float(state["nested_offset"])
        files.need(f"{name}.nested_absmax", ("F32",), (math.ceil(blocks / inner),))
        files.need(f"{name}.nested_quant_map", ("F32",), (256,))
        parts |= {p: f"{name}.{p}" for p in ("nested_absmax", "nested_quant_map")}
    build = partial(_build_four, fmt=_FORMATS[kind], shape=shape, size=size, inner=inner, mean=mean)
    return PackedWeight(name=name, shape=shape, parts=parts, build=build, kept_as=ROLES)


def _build_four(
    t: Mapping[str, Tensor], *, fmt: str, shape: tuple[int, int], size: int, inner: int, mean: float
) -> list[QTensor]:
    stored = t["weight"].reshape(-1).view(torch.uint8)
    codes = stored << 4 | stored >> 4
    if math.prod(shape) % 2:
        codes[-1] &= 15
    scale: Tensor | QTensor = t["absmax"]
    if inner:
        offset = torch.tensor([mean], dtype=torch.float32)
        params = QuantParams(t["nested_absmax"], offset=offset, grid=_grid("dynamic8", t["nested_quant_map"]))
        cut = make_granularity(f"flat={inner}")
        scale = BlockQTensor(get_format("dynamic8"), cut, tuple(t["absmax"].shape), t["absmax"], params)
    params = QuantParams(scale, grid=_grid(fmt, t["quant_map"]))
    return [BlockQTensor(get_format(fmt), make_granularity(f"flat={size}"), shape, codes, params)]


def _grid(fmt: str, table: Tensor) -> Tensor | None:
    """The file's own table, where it isn't the format's."""
    if not bool(table.isfinite().all()):
        raise FileError("a table of values with NaN or Inf.")
    return None if torch.equal(table, torch.tensor(get_format(fmt).values, dtype=torch.float32)) else table


def _eight_bits(module: str, files: Files) -> PackedWeight:
    rows, columns = files.matrix(f"{module}.weight", ("I8",))
    files.need(f"{module}.SCB", ("F32",), (rows,))
    parts = {"weight": f"{module}.weight", "SCB": f"{module}.SCB"}
    order = f"{module}.weight_format"
    if order in files.entries:
        parts["weight_format"] = order
        if files.need(order, ("U8",)).nbytes != 1 or int(files.small(order).reshape(-1)[0]):
            raise ModelError(f"{files.place}: {module} is in an order for tensor cores; save it again as rows.")
    build = partial(_build_eight, shape=(rows, columns))
    return PackedWeight(name=f"{module}.weight", shape=(rows, columns), parts=parts, build=build, kept_as=ROLES)


def _build_eight(t: Mapping[str, Tensor], *, shape: tuple[int, int]) -> list[QTensor]:
    rows = block("int8_full", "channel", shape, t["weight"].view(torch.uint8).reshape(-1), t["SCB"])
    # two products, each rounded, as the library has them: one scale of both would differ in the last bit
    return [OuterScaled(rows, (torch.full((1, 1), _INVERSE_127, dtype=torch.float32),))]


PART = BitsAndBytes()
