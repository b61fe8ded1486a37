"""IQ1_M: as IQ1_S with a scale for 16; the outer float16 scale is in the top halves of the scales' words."""

import numpy as np

from nybble.models.gguf.types import Bytes
from nybble.models.gguf.types._codebook import TERNARY, Book, Numbers, book_type, steps


def _words(data: Bytes) -> Numbers:
    return np.ascontiguousarray(data[:, 48:]).view("<u2")


def _codes(data: Bytes) -> Numbers:
    return (_words(data)[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7).reshape(len(data), -1)


def _outer(data: Bytes) -> tuple[Bytes, Bytes]:
    words = _words(data)
    parts = (words & 0xF000) >> np.array([12, 8, 4, 0], np.uint16)
    half = (parts[:, 0] | parts[:, 1] | parts[:, 2] | parts[:, 3]).astype("<u2")
    blocks = data.copy()
    ones = words & 0x0FFF | np.array([0x0000, 0x0000, 0xC000, 0x3000], np.uint16)  # 0x3C00, 1 in float16
    blocks[:, 48:] = ones.astype("<u2").view(np.uint8)
    return half.view(np.uint8).reshape(len(data), 2), blocks


PART = book_type(29, 16, Book("IQ1_M", 56, tuple(TERNARY), steps(1, 2, 8), _codes, _outer))
