"""Writes ``mlx_golden.tensors``: small matrices as mlx packs them, and what it dequantizes them to in float32.

Run where mlx is (``pip install mlx``; on Linux mlx-cpu too): ``python -m tests.parts.export.mlx_golden``. The file in
the repository is of mlx 0.32.4 on a CPU.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_suffix(".tensors")
AFFINE = [(1, 64), (2, 32), (3, 128), (3, 32), (4, 64), (5, 32), (6, 64), (8, 32)]
FLOAT = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
ROWS, COLUMNS = 3, 128


def matrix() -> np.ndarray[Any, Any]:
    """float32 [3, 128]: normal numbers, a row of them small, zeros, an outlier."""
    found = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    found[1] *= 0.01
    found[2, :32] = 0
    found[2, 40] = 30
    return found


def main() -> None:
    """Pack and unpack by mlx alone."""
    mx = import_module("mlx.core")
    x, made = mx.array(matrix()), dict[str, Any]()
    for bits, group in AFFINE:
        for dtype in (mx.bfloat16, mx.float16):
            name = f"affine-{bits}-{group}-{str(dtype).removeprefix('mlx.core.')}"
            w, s, b = mx.quantize(x.astype(dtype), group, bits)
            made |= {f"{name}.weight": w, f"{name}.scales": s, f"{name}.biases": b}
            made[f"{name}.values"] = mx.dequantize(w, s.astype(mx.float32), b.astype(mx.float32), group, bits)
    for mode, (bits, group) in FLOAT.items():
        w, s = mx.quantize(x, mode=mode)
        made |= {f"{mode}-{bits}-{group}.weight": w, f"{mode}-{bits}-{group}.scales": s}
        made[f"{mode}-{bits}-{group}.values"] = mx.dequantize(w, s, mode=mode, dtype=mx.float32)
    scale = mx.array([2.5], dtype=mx.float32)
    w, s = mx.quantize(x, mode="nvfp4", global_scale=scale[0])
    made |= {"experts-4-16.weight": w[None], "experts-4-16.scales": s[None], "experts-4-16.global_scale": scale}
    made["experts-4-16.values"] = mx.dequantize(w, s, mode="nvfp4", global_scale=scale[0], dtype=mx.float32)
    made_as = FILE.with_suffix(".safetensors")  # which mlx asks for, and git ignores
    mx.save_safetensors(str(made_as), made)
    made_as.replace(FILE)


if __name__ == "__main__":
    main()
