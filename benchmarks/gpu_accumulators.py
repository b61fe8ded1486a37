"""How wide the accumulators of FP8 tensor cores are: which power of two still counts beside a larger number.

Row m of x holds 2^8, 2^(8 - m) and -2^8, which are multiplied by one; what comes out is 2^(8 - m) as long as so many
bits below the larger number are kept. The three are added in one instruction (32 columns), in instructions that follow
each other, or in different tiles (of 128 columns).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nybble.kernels._gpu_tiles import _product

MOST = 24
PLACES = {"one instruction": (0, 1, 2), "neighbours": (0, 40, 80), "tiles": (0, 130, 260)}


def operands(places: tuple[int, int, int], device: str) -> tuple[Tensor, Tensor]:
    """X [32, 384] and W [32, 384] in E4M3; W's columns behind the second place and eight more are 2^-8."""
    x, w = torch.zeros(32, 384), torch.zeros(32, 384)
    large, small, less = places
    w[:, large] = w[:, small] = w[:, less] = 1
    w[:, small + 4] = 2.0**-8
    x[:, large], x[:, less] = 2.0**8, -(2.0**8)
    for m in range(1, MOST + 1):
        x[m, small if m <= 16 else small + 4] = 2.0 ** (8 - m + (0 if m <= 16 else 8))
    return x.to(device, torch.float8_e4m3fn), w.to(device, torch.float8_e4m3fn)


def kept_bits(y: Tensor) -> int:
    """The last m whose number came out, before the first that didn't."""
    found = 0
    for m in range(1, MOST + 1):
        if float(y[m, 0]) != 2.0 ** (8 - m):
            break
        found = m
    return found


def accumulator_bits(device: str = "cuda") -> dict[str, Any]:
    """Bits below the largest that are kept: by Triton's products, promoted and not, and by torch's."""
    found: dict[str, Any] = {}
    one = torch.ones(1, device=device)
    for name, places in PLACES.items():
        x, w = operands(places, device)
        for promote in (None, 128, 64, 32):
            y = torch.full((32, 32), torch.nan, device=device)
            _product[(1,)](
                x, w, y, one, one, one, torch.ones(32, device=device), one, one, one, 32, 32, 32, k=384, DOT=1,
                FLIP=False, GROUPS=1, XZERO=False, WZERO=False, XMANY=False, BIAS=False, PROMOTED=promote,
                ASSEMBLED=device != "cpu", TMA=False, BM=64, BN=32, BK=128, num_warps=4, num_stages=2,
            )  # fmt: skip
            found[f"{name}, promoted every {promote}"] = kept_bits(y)
        if device == "cuda":
            scale = torch.ones((), device=device)
            for fast in (False, True):
                y = torch._scaled_mm(x, w.t(), scale, scale, out_dtype=torch.float32, use_fast_accum=fast)
                found[f"{name}, torch._scaled_mm fast={fast}"] = kept_bits(y)
    return found


if __name__ == "__main__":
    print(accumulator_bits())
