"""Images side by side as a PNG file, for pages: filter 0, one zlib stream (PNG specification, W3C 2003)."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np

GAP = 1
"""White pixels between images."""


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Images side by side, row by row.

    Args:
        images: uint8 [count, height, width] or [count, height, width, 1 or 3].
        columns: of the grid.

    Returns:
        uint8 [height, width, 1 or 3].
    """
    x = images[..., None] if images.ndim == 3 else images
    count, height, width, channels = x.shape
    rows, (down, across) = -(-count // columns), (height + GAP, width + GAP)
    found = np.full((rows * down - GAP, columns * across - GAP, channels), 255, np.uint8)
    for number, image in enumerate(x):
        top, left = number // columns * down, number % columns * across
        found[top : top + height, left : left + width] = image
    return found


def png(image: np.ndarray) -> bytes:
    """A file of uint8 [height, width, 1 or 3]."""
    height, width, channels = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(image))
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(_chunk, chunks))


def data_url(image: np.ndarray) -> str:
    """As pages hold it."""
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


def _chunk(part: tuple[bytes, bytes]) -> bytes:
    name, content = part
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
