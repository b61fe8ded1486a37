"""Where torch contracts a product and a sum into one rounding, which its builds for CPUs and GPUs do otherwise.

A fused kernel that is to have the rule's bits has to do the same. torch is asked, once a device, with numbers of which
each form gives other bits; where it gives those of none, there is no kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DIVISOR = 0.001**0.5
"""A number whose reciprocal is another float32 when it is rounded to float32 before as well."""
ROOT_MODE = 0x2 | 0x00140000 | 0x100
"""As torch calls it: high accuracy, subnormal numbers kept, errors ignored."""
_COUNT = 1003  # odd: also what is left behind whole vectors


@dataclass(frozen=True)
class Forms:
    """The form of each operation, as an index into what :func:`_candidates` lists.

    Attributes:
        lerp: of a weight below 1/2. addcmul: of one tensor twice. square: the same with value=1.
        addcdiv: with a value. add: with an alpha. div: by a number, or times its :func:`reciprocal`. sqrt: as IEEE has
            it, or as MKL.
    """

    lerp: int
    addcmul: int
    square: int
    addcdiv: int
    add: int
    div: int
    sqrt: int

    def meta(self) -> tuple[int, ...]:
        """What is compiled into kernels."""
        return astuple(self)


def reciprocal(number: float, div: int) -> float:
    """What is multiplied with by torch where ``div``, of :class:`Forms`, isn't 0: a float32.

    1: the number is rounded to float32 first. 2: only its reciprocal is, as by torch 2.11 on a GPU.
    """
    return float(np.float32(1) / np.float32(number)) if div == 1 else float(np.float32(1 / number))


def _fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Rounded once but for one case in 2**29: a product of two float32 is exact in float64."""
    return (a.double() * b.double() + c.double()).float()


def _candidates(x: Tensor, g: Tensor, d: Tensor, by: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """What each form of each operation gives for ``x``, ``g``, divisors ``d`` and the number ``by``."""
    root = vector_root() if d.device.type == "cpu" else None
    of_library = () if root is None else (root(d),)
    return {
        "lerp": (x + by * (g - x), _fused(by, g - x, x)),
        "addcmul": (x + (by * g) * g, _fused(by * g, g, x), x + by * (g * g), _fused(by, g * g, x)),
        "square": (x + g * g, _fused(g, g, x)),
        "addcdiv": (x + (by * g) / d, x + by * (g / d), _fused(by, g / d, x)),
        "add": (x + by * g, _fused(by, g, x)),
        "div": (x / torch.full_like(x, DIVISOR), *(x * reciprocal(DIVISOR, form) for form in (1, 2))),
        "sqrt": (d.double().sqrt().float(), *of_library),
    }


@cache
def forms(device: torch.device) -> Forms | None:
    """Of torch on this device; None where it does an operation in no form that is known."""
    generator = torch.Generator("cpu").manual_seed(0)
    x, g, d = (torch.randn(_COUNT, generator=generator, dtype=torch.float32, device="cpu").to(device) for _ in range(3))
    d = d.abs() + 0.1
    value = 0.09999999999999998
    by = torch.full((), value, dtype=torch.float32, device=device)
    asked: dict[str, Callable[[], Tensor]] = {
        "lerp": lambda: x.lerp(g, value),
        "addcmul": lambda: x.addcmul(g, g, value=value),
        "square": lambda: x.addcmul(g, g),
        "addcdiv": lambda: x.addcdiv(g, d, value=value),
        "add": lambda: x.add(g, alpha=value),
        "div": lambda: x / DIVISOR,
        "sqrt": lambda: d.sqrt(),
    }
    with torch.no_grad():
        told = _candidates(x, g, d, by)
        found = {name: _which(ask(), told[name]) for name, ask in asked.items()}
    return None if None in found.values() else Forms(**{name: at for name, at in found.items() if at is not None})


@cache
def vector_root_address() -> int | None:
    """Address of MKL's ``vmsSqrt`` in the library of torch, whose square roots on a CPU are off by an ulp now and then.

    ``void vmsSqrt(int n, const float* x, float* y, int64_t mode)``
    """
    place = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(place)).vmsSqrt, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def vector_root() -> Callable[[Tensor], Tensor] | None:
    """Its square root of a float32 tensor, or None where there is no such library."""
    address = vector_root_address()
    if address is None:
        return None
    call = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(address)

    def root(x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        call(x.numel(), x.data_ptr(), out.data_ptr(), ROOT_MODE)
        return out

    return root


def _which(given: Tensor, told: tuple[Tensor, ...]) -> int | None:
    return next((i for i, values in enumerate(told) if torch.equal(given, values)), None)
