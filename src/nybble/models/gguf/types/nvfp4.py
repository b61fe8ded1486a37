"""NVFP4: four blocks of 16 E2M1 values, each under a scale in E4M3 without its sign.

ggml reads a scale byte of 0x7F, which is NaN in E4M3, as 0; so it is read as the code 0, which has the same value. A
scale with a sign bit is none. The scale of the scales is no part of the block: a file may have it as a tensor of its
own,
``NAME.scale``, float32 [1] (:func:`nybble.models.gguf.qtensors.with_global_scale`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nybble.core.errors import FileError
from nybble.models.gguf.types import Bytes, Parts, WritableType
from nybble.models.gguf.types._fields import Pairs


@dataclass(frozen=True)
class Unsigned:
    """E4M3 codes of numbers that are never negative."""

    part: str = "scale"
    nbytes: int = 4

    def read(self, data: Bytes) -> Parts:  # noqa: D102
        if data.size and int(data.max()) > 0x7F:
            raise FileError(
                f"a scale of NVFP4 has no sign; found the byte 0x{int(data.max()):02x}. The file is damaged."
            )
        return {self.part: np.where(data == 0x7F, np.uint8(0), data)}

    def write(self, parts: Parts) -> Bytes:  # noqa: D102
        return parts[self.part]


PART = WritableType(
    number=40,
    block=64,
    line="nvfp4",
    fields=(Unsigned(), Pairs("codes", 32, run=8)),
)
