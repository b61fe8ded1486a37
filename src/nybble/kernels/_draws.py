"""Random numbers of torch's generators on a CPU by the compiled library: the same ones, a few hundred at a time.

torch draws them one by one from a Mersenne Twister, which took longer than the rest of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from nybble.kernels._library import library, team
from nybble.optim._weights import random_bits

_ISA = 3


def draws(params: Sequence[Tensor], generators: Sequence[torch.Generator]) -> list[Tensor]:
    """:func:`~nybble.optim._weights.random_bits` of each parameter, by its generator.

    Args:
        params: on the CPU.
        generators: that nothing has been drawn from; they stay so.

    Returns:
        int16 [elements] each, the bits of numbers from 0 to 2**16 - 1.
    """
    if not _as_torch():
        return [random_bits(p, each).to(torch.int16).view(-1) for p, each in zip(params, generators, strict=True)]
    return drawn([each.initial_seed() for each in generators], [p.numel() for p in params])


def drawn(seeds: Sequence[int], counts: Sequence[int], isa: int = _ISA) -> list[Tensor]:
    """By the library: so many numbers of each of these seeds."""
    made = list(torch.split(torch.empty(sum(counts), dtype=torch.int16, device="cpu"), list(counts)))
    given = np.array(seeds, np.uint64), np.array(counts, np.int64), np.array([x.data_ptr() for x in made], np.int64)
    call = library()
    assert call is not None
    call.nybble_draw(*(x.ctypes.data for x in given), len(made), torch.get_num_threads(), isa, team())
    return made


@cache
def _as_torch() -> bool:
    """Whether this torch's generators draw so; asked of two rounds of the twister and a part of a third."""
    seed, count = 0x1234_5678_9ABC, 1300
    own = random_bits(torch.empty(count, device="cpu"), torch.Generator().manual_seed(seed))
    return torch.equal(drawn([seed], [count])[0], own.to(torch.int16))
