"""Whether numbers are finite, told by their bits: no pass over memory makes a copy of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1 << 18  # bytes at a time: they stay in the cache


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any floating dtype holds no NaN and no infinity.

    >>> import torch
    >>> all_finite(torch.tensor([65504.0, torch.inf]).half())
    False
    """
    import torch

    kinds = {torch.float32: ("u4", 0x7F800000), torch.float16: ("u2", 0x7C00), torch.bfloat16: ("u2", 0x7F80)}
    if tensor.dtype not in kinds or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return bool(torch.isfinite(tensor).all())
    name, exponent = kinds[tensor.dtype]  # all of whose bits are set in others alone
    bits = tensor.detach().reshape(-1).view(torch.uint8).numpy().view(name)
    step = _CHUNK // tensor.element_size()
    return all(
        int((bits[start : start + step] & bits.dtype.type(exponent)).max()) < exponent
        for start in range(0, len(bits), step)
    )
