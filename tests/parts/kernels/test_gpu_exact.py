# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Quotients and roots of the optimizers' kernels have the bits of torch's, which are IEEE's.

On a GPU by the assembly; in Triton's interpreter that is left out, and only divisions by blocks are not numpy's own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contracts.interpreted import DEVICE
from torch import Tensor

pytest.importorskip("triton", reason="Triton is optional")
import triton
import triton.language as tl

from nybble.kernels import _gpu_exact as exact

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning")
BLOCK, TILE = 64, 2048
BLOCKS = TILE // BLOCK


@triton.jit
def over_blocks(x, by, y, BLOCK: tl.constexpr, TILE: tl.constexpr):
    at = tl.arange(0, TILE)
    scales = tl.load(by + tl.arange(0, TILE // BLOCK))
    tl.store(y + at, exact.over_blocks(tl.load(x + at), scales, BLOCK, TILE))


@triton.jit
def each(x, by, y, ROOT: tl.constexpr, TILE: tl.constexpr):
    at = tl.arange(0, TILE)
    if ROOT:
        tl.store(y + at, exact.roots(tl.load(x + at)))
    else:
        tl.store(y + at, exact.quotients(tl.load(x + at), tl.load(by + at)))


def run(kernel: Any, x: Tensor, by: Tensor, **more: Any) -> Tensor:
    y = torch.empty_like(x, device=DEVICE)
    kernel[(1,)](x.to(DEVICE), by.to(DEVICE), y, TILE=TILE, enable_fp_fusion=False, **more)
    return y.cpu()


@pytest.mark.parametrize("seed", range(3))
def test_quotients_of_blocks_are_rounded_once(seed: int) -> None:
    """Dividends next to the middle between two quotients, by divisors from 2^-80 to 2^100."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.linspace(-80, 99, BLOCKS).round()
    by = (1 + torch.rand(BLOCKS, generator=generator)) * 2**powers
    quotients = (1 + torch.rand(BLOCKS, BLOCK, generator=generator)) * 2.0 ** -(torch.arange(BLOCK) % 24 + 1)
    middles = (quotients.double() + torch.nextafter(quotients, torch.tensor(2.0)).double()) / 2
    x = (middles * by.double()[:, None]).float() * torch.tensor([1.0, -1.0]).repeat(BLOCK // 2)
    assert torch.equal(run(over_blocks, x.view(-1), by, BLOCK=BLOCK).view(x.shape), x / by[:, None])


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e-41, 1e7, 1e38])
def test_quotients_and_roots_of_all_sizes(size: float) -> None:
    """Zeros of both signs, and what is left to the slow way among what isn't."""
    generator = torch.Generator().manual_seed(1)
    x, by = (torch.randn(2, TILE, generator=generator) * size).unbind()
    x[::7], x[3] = 0, -0.0
    by = (by.abs() + 1e-40) / size**0.5
    found, told = run(each, x, by, ROOT=False), x / by
    assert torch.equal(found.view(torch.int32), told.view(torch.int32))
    assert torch.equal(run(each, x.abs(), by, ROOT=True), x.abs().double().sqrt().float())
