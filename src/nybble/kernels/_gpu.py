"""What the Triton kernels share: whether Triton is there and recent enough, and whether it only interprets them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
import triton
from torch import Tensor

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


Told = tuple[tuple[Any, ...], tuple[int, int, int], Mapping[str, Any]]
"""Arguments of a kernel in their order, programs, and the constants and options by name."""


class Launches:
    """What Triton compiled, kept by what its caller says decides that.

    Triton looks at every argument of every launch to find what it compiled; that takes longer than the rest of a call.
    A key has to hold whatever changes a type, a constant, a whole number, or whether a pointer is a multiple of 16.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}

    def __call__(self, key: Hashable, kernel: Any, args: tuple[Any, ...], more: Callable[[], Told]) -> None:
        """Launch a kernel.

        Args:
            key: see above; with the device, and all that ``more`` depends on.
            kernel: Triton's.
            args: what comes before its constants, but for what ``more`` adds behind them.
            more: numbers behind ``args``, programs and constants; called where nothing was kept.
        """
        made = self._made.get(key)
        if made is not None:
            made[0](*args, *made[1])
            return
        numbers, grid, meta = more()
        compiled = kernel[grid](*args, *numbers, **meta)
        if compiled is not None:  # the interpreter compiles nothing
            constants = tuple(meta[name] for name in kernel.arg_names[len(args) + len(numbers) :])
            self._made[key] = compiled[grid], (*numbers, *constants)


def aligned(tensor: Tensor | None) -> bool | None:
    """Whether a pointer is a multiple of 16, which Triton compiles in; None of none."""
    return None if tensor is None else tensor.data_ptr() % 16 == 0


def traits(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Of each tensor what Triton compiles in: its type, and whether its pointer is a multiple of 16."""
    return tuple(None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors)


def elsewhere(x: Tensor) -> bool:
    """Whether a tensor is on another GPU than the current one, where kernels are launched."""
    return x.is_cuda and x.get_device() != torch.cuda.current_device()
