"""Random numbers by the compiled library are torch's, whose generators on a CPU are Mersenne Twisters."""

from __future__ import annotations

import pytest
import torch

from nybble.kernels import _draws
from nybble.kernels._library import library
from nybble.optim._weights import random_bits

COUNTS = (0, 1, 226, 227, 623, 624, 625, 1871, 5000)
SEEDS = (0, 1, 5489, 2**32 - 1, 2**32 + 7, 2**63 - 1, 12, 13, 14)


@pytest.mark.parametrize("isa", [0, 2, 3])
def test_they_are_torchs(isa: int) -> None:
    """Ends inside a round of the twister and between two, seeds of more than 32 bits; several tensors at once."""
    if library() is None:
        pytest.skip("no C++ compiler")
    for found, seed, count in zip(_draws.drawn(SEEDS, COUNTS, isa), SEEDS, COUNTS, strict=True):
        known = torch.randint(0, 1 << 16, (count,), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(found.long() & 0xFFFF, known)


@pytest.mark.parametrize("alike", [True, False])
def test_of_parameters(alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch itself where it should ever draw otherwise."""
    if library() is None:
        pytest.skip("no C++ compiler")
    assert _draws._as_torch()
    if not alike:
        monkeypatch.setattr(_draws, "_as_torch", lambda: False)
        monkeypatch.setattr(_draws, "drawn", None)
    params = [torch.zeros(3, 5), torch.zeros(700)]
    made, known = ([torch.Generator().manual_seed(seed) for seed in (4, 2**40)] for _ in range(2))
    for found, p, generator in zip(_draws.draws(params, made), params, known, strict=True):
        assert found.dtype == torch.int16
        assert torch.equal(found.long() & 0xFFFF, random_bits(p, generator).view(-1).long())
