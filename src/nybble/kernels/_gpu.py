"""What the Triton kernels share: whether Triton is there and recent enough, and whether it only interprets them."""

from __future__ import annotations

import triton

LEAST = (3, 4)
"""The oldest Triton whose kernels were checked."""


def check_version(version: str) -> None:
    """Raise ImportError for a Triton that is older; the loader says so once and leaves the kernels out."""
    found = tuple(int(part) for part in version.split(".")[:2])
    if found < LEAST:
        raise ImportError(f"Triton {version} is older than {'.'.join(map(str, LEAST))}; install triton>=3.6")


check_version(triton.__version__)
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on the CPU: it has no assembler and no bfloat16 products."""


def shared(x: int) -> int:
    """The power of two at or above ``x``, at least 16: a block's size."""
    return max(16, 1 << max(0, x - 1).bit_length())
