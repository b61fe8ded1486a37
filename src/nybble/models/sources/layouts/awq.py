"""AWQ (AutoAWQ's ``gemm`` files): four bits with zero points, eight outputs in a word, interleaved.

``qweight`` int32 [in, out / 8], ``qzeros`` int32 [groups, out / 8], ``scales`` float16 [groups, out]. The nibbles of a
word, lowest first, are those of its outputs 0, 2, 4, 6, 1, 3, 5, 7. x = scale * (code - zero point).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import FileError, ModelError
from nybble.models.sources.layouts import FLOATS, Files, Layout, PackedWeight, whole
from nybble.models.sources.layouts._pieces import block, group_word, integers, packed, stream_rows
from nybble.qtensor import QTensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
ROLES = {"qweight": "codes", "scales": "scales", "qzeros": "offsets"}


class Awq(Layout):
    """See the module."""

    def weights(self, config: Mapping[str, Any], files: Files) -> Iterator[PackedWeight]:  # noqa: D102
        bits = config.get("bits", config.get("w_bit", 4))
        version = str(config.get("format") or config.get("version") or "gemm").lower()
        if bits != 4 or version != "gemm":
            raise ModelError(
                f"{files.place} is AWQ of {bits!r:.20} bits in the version {version!r:.20}; 4 bits of gemm are read. "
                "AutoAWQ writes those with version='GEMM'."
            )
        size = whole(config.get("group_size", config.get("q_group_size", 128)), -1, 1 << 30, "group_size")
        for module in files.ending("qweight"):
            yield _weight(module, size, files)


def _weight(module: str, size: int, files: Files) -> PackedWeight:
    columns, count = files.matrix(f"{module}.qweight", ("I32",))
    rows = 8 * count
    size = columns if size < 1 else size
    if columns % size:
        raise FileError(f"{files.place}: {module} has {columns} inputs, which groups of {size} don't divide.")
    files.need(f"{module}.scales", FLOATS, (columns // size, rows))
    parts = {role: f"{module}.{role}" for role in ("qweight", "scales", "qzeros")}
    files.need(f"{module}.qzeros", ("I32",), (columns // size, count))
    build = partial(_build, size=size, shape=(rows, columns))
    return PackedWeight(name=f"{module}.weight", shape=(rows, columns), parts=parts, build=build, kept_as=ROLES)


def _build(t: Mapping[str, Tensor], *, size: int, shape: tuple[int, int]) -> list[QTensor]:
    rows, columns = shape
    zero = integers(_outputs(t["qzeros"], rows), "uint4")
    codes = packed(_outputs(t["qweight"], rows), 4)
    return [block("uint4", group_word(size, columns), shape, codes, t["scales"].T.contiguous(), zero)]


def _outputs(stored: Tensor, rows: int) -> Tensor:
    """int32 [n, rows / 8] -> uint8 [rows, n], in the order of the outputs."""
    nibbles = stream_rows(stored, 4, rows).view(len(stored), -1, 8)
    back = torch.tensor([ORDER.index(i) for i in range(8)], dtype=torch.int64)
    return nibbles[:, :, back].reshape(len(stored), rows).T.contiguous()


PART = Awq()
