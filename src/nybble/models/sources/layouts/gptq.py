"""GPTQ (AutoGPTQ, GPTQModel): integers of 2 to 8 bits, zero points, and columns in the order of activations.

``qweight`` int32 [words of in, out], a little-endian stream down each column; ``qzeros`` int32 [groups, words of out];
``scales`` [groups, out]; ``g_idx`` int32 [in], the group of each input. x = scale * (code - zero point).

The trap: files of ``checkpoint_format`` gptq (the first, and what is meant where none is named) hold zero points *less
one*, and the sum wraps around in as many bits as a code has; gptq_v2 holds them as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import FileError, ModelError
from nybble.models.sources.layouts import FLOATS, Files, Layout, PackedWeight, whole, words
from nybble.models.sources.layouts._pieces import (
    block,
    group_word,
    in_order,
    integers,
    packed,
    reordered,
    stream_rows,
)
from nybble.qtensor import QTensor

LESS_ONE = {"gptq": 1, "gptq_v2": 0}
ROLES = {"qweight": "codes", "scales": "scales", "qzeros": "offsets", "g_idx": "tables"}


class Gptq(Layout):
    """See the module."""

    def weights(self, config: Mapping[str, Any], files: Files) -> Iterator[PackedWeight]:  # noqa: D102
        bits = whole(config.get("bits"), 2, 8, "bits of quantization_config")
        form = config.get("checkpoint_format") or "gptq"
        if form not in LESS_ONE:
            raise ModelError(f"{files.place} has the checkpoint_format {form!r:.40}; readable: {', '.join(LESS_ONE)}.")
        size = whole(config.get("group_size", -1), -1, 1 << 30, "group_size of quantization_config")
        for module in files.ending("qweight"):
            yield _weight(module, bits, size, LESS_ONE[form], files)


def _weight(module: str, bits: int, size: int, less: int, files: Files) -> PackedWeight:
    count, rows = files.matrix(f"{module}.qweight", ("I32",))
    columns = count * 32 // bits
    index = f"{module}.g_idx"
    if index in files.entries:
        columns = files.need(index, ("I32",)).nbytes // 4
    if words(columns, bits) != count:
        raise FileError(f"{files.place}: {module}.qweight has {count} words a column; {columns} inputs need another.")
    size = columns if size < 1 else min(size, columns)
    groups = -(-columns // size)
    files.need(f"{module}.scales", FLOATS, (groups, rows))
    files.need(f"{module}.qzeros", ("I32",), (groups, words(rows, bits)))
    parts = {role: f"{module}.{role}" for role in ("qweight", "scales", "qzeros")}
    if index in files.entries:
        files.need(index, ("I32",), (columns,))
        parts["g_idx"] = index
    build = partial(_build, bits=bits, size=size, less=less, shape=(rows, columns))
    return PackedWeight(name=f"{module}.weight", shape=(rows, columns), parts=parts, build=build, kept_as=ROLES)


def _build(t: Mapping[str, Tensor], *, bits: int, size: int, less: int, shape: tuple[int, int]) -> list[QTensor]:
    rows, columns = shape
    codes = stream_rows(t["qweight"].T.contiguous(), bits, columns)
    order = in_order(t["g_idx"], size) if "g_idx" in t else None
    if order is not None:
        codes = codes[:, order.long()]
    points = stream_rows(t["qzeros"], bits, rows).T.contiguous()
    points = (points.to(torch.int16) + less & (1 << bits) - 1).to(torch.uint8)
    zero = integers(points, f"uint{bits}")
    scale = t["scales"].T.contiguous()
    found = block(f"uint{bits}", group_word(size, columns), shape, packed(codes, bits), scale, zero)
    return [reordered(found, order)]


PART = Gptq()
