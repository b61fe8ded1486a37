"""Inputs on which implementations like to differ."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nybble.formats import NumberFormat


def all_float16() -> Tensor:
    """Every float16, NaNs included, as float32 [65536]."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()


def random_bits(count: int, seed: int = 0) -> Tensor:
    """Float32 of random bit patterns: all exponents alike, odd ones in front."""
    odd = [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0xFF80FFFF, 0x80000000, 0]
    odd += [1, 0x80000001, 0x007FFFFF, 0x807FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000, 0xBF800000]
    bits = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)
    bits[: len(odd)] = odd
    return torch.from_numpy(bits.view(np.float32))


def near_decisions(fmt: NumberFormat) -> Tensor:
    """Float32: every value of the grid and every midpoint, each with its two neighbours, and both zeros."""
    points = np.concatenate([fmt.grid, fmt.grid[:-1] / 2 + fmt.grid[1:] / 2, [0.0, -0.0]]).astype(np.float32)
    below = np.nextafter(points, np.float32(-np.inf))
    above = np.nextafter(points, np.float32(np.inf))
    return torch.from_numpy(np.concatenate([below, points, above]))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, but for the payload of NaNs."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    nan = a.isnan()
    alike = (a == b) & (a.signbit() == b.signbit())
    return bool((alike | nan).all()) and torch.equal(nan, b.isnan())
