"""MXFP4 as gpt-oss has it: fused experts, E2M1 in groups of 32 under powers of two.

``X_blocks`` uint8 [experts, out, in / 32, 16], the first of two codes in the low nibble; ``X_scales`` uint8
[experts, out, in / 32], exponents + 127. The parameter X that they stand for is [experts, in, out].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from nybble.core.errors import FileError
from nybble.models.sources.layouts import Files, Layout, PackedWeight
from nybble.models.sources.layouts._pieces import E2M1, mx
from nybble.qtensor import QTensor

ROLES = {"blocks": "codes", "scales": "scales"}


class Mxfp4(Layout):
    """See the module."""

    def weights(self, config: Mapping[str, Any], files: Files) -> Iterator[PackedWeight]:  # noqa: D102
        names = [
            name.removesuffix(end) for end in ("_blocks", "_scales") for name in files.entries if name.endswith(end)
        ]
        for name in dict.fromkeys(names):
            shape = files.need(f"{name}_blocks", ("U8",)).shape
            if len(shape) != 4 or shape[3] != 16 or not all(shape):
                raise FileError(
                    f"{files.place}: {name}_blocks is {list(shape)}; [experts, out, in / 32, 16] is needed."
                )
            files.need(f"{name}_scales", ("U8",), shape[:3])
            experts, rows, groups, _ = shape
            yield PackedWeight(
                name=name,
                shape=(experts, 32 * groups, rows),
                parts={"blocks": f"{name}_blocks", "scales": f"{name}_scales"},
                build=partial(_build, shape=(rows, 32 * groups)),
                kept_as=ROLES,
                transposed=True,
            )


def _build(t: Mapping[str, Tensor], *, shape: tuple[int, int]) -> list[QTensor]:
    # each with memory of its own: a view would keep, and a file would hold, those of all experts
    return [mx(E2M1, shape, b.clone(), s.clone()) for b, s in zip(t["blocks"], t["scales"], strict=True)]


PART = Mxfp4()
