"""The number above NVFP4's scales, which some files multiply with and others divide by."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

_LARGEST = 6.0 * 448.0
"""Of E2M1 times that of E4M3: a weight's largest magnitude over it is the factor that libraries choose."""


def reciprocals(value: Tensor) -> Iterator[float]:
    """float32 numbers near ``1 / value``, the best first.

    That is one whose own reciprocal is ``value`` again, so that there and back is the same; of several one that a
    maximum in 16 bits gives, which is how it came about.

    Args:
        value: float32, one positive number.
    """
    yield from _near(value.float().reshape(-1)[0].item())


@cache
def _near(value: float) -> tuple[float, ...]:
    one = torch.tensor([value], dtype=torch.float32)
    infinite = torch.tensor([torch.inf], dtype=torch.float32)
    low = high = 1 / one
    near = [low]
    for _ in range(8):
        low, high = torch.nextafter(low, -infinite), torch.nextafter(high, infinite)
        near += [low, high]
    ordered = sorted(enumerate(near), key=lambda pair: (*_worse(pair[1], one), pair[0]))
    return tuple(found.item() for _, found in ordered)


def _worse(found: Tensor, value: Tensor) -> tuple[bool, bool]:
    return not torch.equal(1 / found, value), not (_of_maximum(found) or _of_maximum(found, divisor=True))


def _of_maximum(found: Tensor, divisor: bool = False) -> bool:
    largest = _LARGEST / found if divisor else found * _LARGEST
    for dtype in (torch.bfloat16, torch.float16):
        rounded = largest.to(dtype).float()
        if torch.equal(_LARGEST / rounded if divisor else rounded / _LARGEST, found):
            return True
    return False
