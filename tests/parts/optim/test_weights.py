"""bfloat16 weights beyond the nearest: 24-bit masters over all mantissas, stochastic rounding; in a rule, in files."""

from __future__ import annotations

import io
import struct
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nybble.core.errors import FileError, SchemeError, UsageError
from nybble.optim import flatten, unflatten
from nybble.optim._weights import join24, split24, stochastic_bfloat16
from nybble.optim.adamw import AdamW

SIXTEEN = -0x100
"""Mask of a float32's first 24 bits: sign, exponent, and 15 of the significand's bits."""


def floats(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def nearest24(x: Tensor) -> Tensor:
    """To 16 bits of significand, ties to even, by float64's sum with a number that pushes out what is below."""
    big = 1.5 * 2.0 ** (torch.frexp(x)[1] - 16 + 52).double()
    return ((x.double() + big) - big).float()


@pytest.mark.parametrize("exponent", [1, 127, 200, 253])
def test_all_mantissas(exponent: int) -> None:
    """Each of 2**23: the nearest of 24 bits comes back, and the bfloat16 alone is a nearest one."""
    x = floats(exponent << 23 | torch.arange(1 << 23, dtype=torch.int32))
    x = torch.where(torch.arange(len(x)) % 2 == 1, -x, x)
    weight, residual = split24(x)
    assert weight.dtype == torch.bfloat16 and residual.dtype == torch.int8
    back = join24(weight, residual)
    assert torch.equal(back, nearest24(x))
    assert residual.min() == -128 and residual.max() == 127
    ulp = 2.0 ** (exponent - 127 - 7)
    assert (weight.double() - back.double()).abs().max() == ulp / 2
    assert (back.double() - x.double()).abs().max() == ulp / 512


def test_every_24_bits_are_kept() -> None:
    """What has been joined is split into the same two again: all 2**15 significands of all exponents and both signs."""
    top = torch.arange(
        0, 0x7F800000, 0x100 * 257, dtype=torch.int64
    )  # an odd stride: all significands of all exponents
    for sign in (0, -0x80000000):
        x = floats((top & SIXTEEN) | sign)
        weight, residual = split24(x)
        inside = x.abs() < 3.38e38
        assert torch.equal(join24(weight, residual)[inside], x[inside])
        assert weight.isfinite().all()  # the largest saturate rather than become infinite


def test_what_is_no_number() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    weight, residual = split24(x)
    assert torch.equal(weight[[0, 1, 3, 4]].float(), x[[0, 1, 3, 4]]) and weight[2].isnan() and not residual.any()
    assert struct.pack("f", join24(weight, residual)[4]) == struct.pack("f", -0.0)
    assert join24(torch.zeros(1, dtype=torch.bfloat16), torch.tensor([-5], dtype=torch.int8)) == 0  # a weight set to 0


def test_stochastic_rounding_is_unbiased() -> None:
    """10**5 draws: exact numbers never move, others go up with the share of the way; 5 standard errors."""
    generator = torch.Generator().manual_seed(0)
    start = torch.tensor([1.0, -2.5, 1 + 2.0**-9, -1 - 3 * 2.0**-10, 1 + 127 * 2.0**-14, 3e38, 1e-40])
    draws = stochastic_bfloat16(start.expand(100_000, -1), generator).double()
    assert (draws[:, :2] == start[:2].double()).all()
    for x, column in zip(start[2:].double(), draws[:, 2:].T, strict=True):
        low, high = column.min(), column.max()
        share = (x - low) / (high - low)
        assert low < x < high and len(column.unique()) == 2
        assert abs((column == high).double().mean() - share) < 5 * (share * (1 - share) / 100_000) ** 0.5
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert torch.equal(stochastic_bfloat16(special, generator).isfinite(), torch.tensor([False] * 3))


# ---------------------------------------------------------------------------------------------------------- in a rule
def trained(weights: Any, steps: int = 40, **options: Any) -> tuple[nn.Parameter, AdamW]:
    start = torch.linspace(0.5, 2, 4096).bfloat16()
    p = nn.Parameter(start.clone())
    optimizer = AdamW([p], lr=1e-4, weight_decay=0.0, weights=weights, **options)
    for step in range(steps):
        p.grad = (torch.rand(4096, generator=torch.Generator().manual_seed(step)) + 0.5).bfloat16()
        optimizer.step()
    return p, optimizer


def test_small_steps_add_up() -> None:
    """40 steps of about 1e-4 on weights whose half unit is 2e-3 to 8e-3: the nearest loses them all, others none."""
    wide = nn.Parameter(torch.linspace(0.5, 2, 4096).bfloat16().float())
    twin = torch.optim.AdamW([wide], lr=1e-4, weight_decay=0.0)
    for step in range(40):
        wide.grad = (torch.rand(4096, generator=torch.Generator().manual_seed(step)) + 0.5).bfloat16().float()
        twin.step()
        wide.data.copy_(nearest24(wide.data))
    stuck, _ = trained("nearest", state=None)
    assert torch.equal(stuck, torch.linspace(0.5, 2, 4096).bfloat16())
    p, optimizer = trained("residual8", state=None)
    assert torch.equal(join24(p.detach(), optimizer.state[p]["residual"]), wide)  # the rule, in 24 bits
    assert optimizer.state_bytes()["residual"] == 4096
    drawn, _ = trained("stochastic", state=None)
    moved, ought = (x.detach().double().mean() - stuck.detach().double().mean() for x in (drawn, wide))
    assert abs(moved / ought - 1) < 0.1 and ought < -3e-3


@pytest.mark.parametrize("weights", ["residual8", "stochastic"])
def test_resumes(weights: Any) -> None:
    p, optimizer = trained(weights, 20, seed=5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = unflatten(*flatten(torch.load(file, weights_only=True)))
    q = nn.Parameter(p.detach().clone())
    resumed = AdamW([q], weights=weights)
    resumed.load_state_dict(saved)
    for step in range(3):
        for x, o in ((p, optimizer), (q, resumed)):
            x.grad = torch.full((4096,), 0.25 * step + 0.1).bfloat16()
            o.step()
    assert torch.equal(p, q)
    if weights == "residual8":
        assert torch.equal(optimizer.state[p]["residual"], resumed.state[q]["residual"])
        with pytest.raises(SchemeError, match=r"residual8, and kept here as nearest.*convert=True"):
            AdamW([nn.Parameter(p.detach())]).load_state_dict(saved)
        AdamW([nn.Parameter(p.detach())]).load_state_dict(saved, convert=True)
        saved["state"][0]["residual"] = saved["state"][0]["residual"][:5]
        with pytest.raises(FileError, match=r"residual: int8 of shape \[4096\] belongs here; found torch.int8 \[5\]"):
            resumed.load_state_dict(saved)


def test_other_dtypes() -> None:
    """float32 has no need of it, float16 is refused."""
    p = nn.Parameter(torch.ones(64))
    optimizer = AdamW([p], weights="residual8")
    p.grad = torch.ones(64)
    optimizer.step()
    assert "residual" not in optimizer.state[p]
    with pytest.raises(UsageError, match="weights=residual8 is for bfloat16"):
        AdamW([nn.Parameter(torch.ones(3, dtype=torch.float16))], weights="residual8")
    with pytest.raises(UsageError, match="one of nearest, stochastic, residual8"):
        AdamW([nn.Parameter(torch.ones(3))], weights="float8")  # type: ignore[arg-type]  # the point of it
