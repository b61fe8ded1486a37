"""Blocks of integers against exact arithmetic: fractions of Python, torch's functions in float64."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nybble.core.errors import DataError, ModelError, SchemeError
from nybble.nn.integer.block_norm import BlockNorm
from nybble.nn.integer.block_products import check_columns, product
from nybble.nn.integer.block_softmax import block_softmax
from nybble.nn.integer.block_table import BlockTable
from nybble.nn.integer.blocks import Blocks, narrow
from nybble.nn.integer.shifts import bit_length, power_of_two, shift_right
from nybble.quantizer import Quantizer

FINE = 30


def drawn(*shape: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    """Rows whose strips differ in magnitude, on a grid of 2^-30."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=made, dtype=torch.float64)
    return x * torch.exp(spread * torch.randn(*shape[:-1], shape[-1] // 8, generator=made)).repeat_interleave(8, -1)


def blocks(x: Tensor, strip: int = 8) -> Blocks:
    wide = torch.round(x * 2.0**FINE).to(torch.int64)
    return narrow(wide, torch.full_like(wide, FINE), strip)


def values(x: Blocks) -> Tensor:
    return x.codes.double() * power_of_two(-x.each())


def simulated(x: Blocks) -> Blocks:
    return Blocks(x.codes.double(), x.shifts, x.strip)


def same(x: Blocks, y: Blocks) -> bool:
    return torch.equal(x.codes.double(), y.codes.double()) and torch.equal(x.shifts, y.shifts)


# -------------------------------------------------------------------------------------------------------------- shifts
def test_shifts_round_half_up_in_both_directions() -> None:
    q, by = torch.meshgrid(torch.arange(-70, 71), torch.arange(-3, 9), indexing="ij")
    wanted = [
        [math.floor(Fraction(a) / Fraction(2) ** b + Fraction(1, 2)) for b in range(-3, 9)] for a in range(-70, 71)
    ]
    assert shift_right(q, by).tolist() == wanted
    assert shift_right(q.double(), by).tolist() == wanted
    assert shift_right(torch.tensor([2**60, -(2**60)]), torch.tensor(200)).tolist() == [0, 0]


def test_bit_lengths_are_pythons() -> None:
    m = [0, 1, 2, 3, 4, 127, 128, 2**31 - 1, 2**31, 2**52]
    assert bit_length(torch.tensor(m)).tolist() == [k.bit_length() for k in m]
    assert bit_length(torch.tensor(m, dtype=torch.float64)).tolist() == [k.bit_length() for k in m]


# -------------------------------------------------------------------------------------------------------------- strips
def test_codes_are_those_of_the_quantizer_and_stay_themselves() -> None:
    x = drawn(50, 32)
    found = blocks(x)
    wanted = Quantizer("int8 group=8 scale=pow2").fake_quantize(torch.round(x * 2.0**FINE) / 2.0**FINE).double()
    ties = ((x * power_of_two(found.each())) % 1 - 0.5).abs() < 1e-6
    assert torch.equal(values(found)[~ties], wanted[~ties]) and int(ties.sum()) < 10
    again = narrow(found.codes.long(), found.shifts.repeat_interleave(8, -1).long(), 8)
    assert same(found, again)
    assert same(found, narrow(found.codes.double(), found.each(), 8))


def test_a_power_of_two_moves_the_shifts_alone() -> None:
    x = drawn(20, 32, spread=1)
    one, other = blocks(x), blocks(x * 8)
    assert torch.equal(one.codes, other.codes) and torch.equal(one.shifts - 3, other.shifts)


def test_errors_are_within_half_a_unit_but_at_the_top() -> None:
    x = torch.round(drawn(200, 32) * 2.0**FINE) / 2.0**FINE
    found = blocks(x)
    unit = power_of_two(-found.each())
    inside = found.codes.abs() < 127
    assert bool(((values(found) - x).abs() <= unit / 2)[inside].all())
    assert bool(((values(found) - x).abs() <= unit)[~inside].all()) and int((~inside).sum()) > 0


def test_smaller_strips_lose_less() -> None:
    x = drawn(100, 64)
    energy = x.view(100, 8, 8).square().mean(-1)
    off = [(values(blocks(x, strip)) - x).view(100, 8, 8).square().mean(-1) / energy for strip in (64, 32, 16, 8)]
    lost = [float(part.mean()) for part in off]
    assert lost == sorted(lost, reverse=True) and lost[0] > 100 * lost[-1]


def test_zeros_and_short_strips() -> None:
    x = torch.zeros(2, 11)
    x[1, 10], x[1, 0] = 1.0, -(2.0**-9)
    found = blocks(x)
    assert torch.equal(values(found), x.double()) and found.shifts.tolist() == [[127, 127], [15, 6]]
    assert int(found.codes[1, 10]) == 64


def test_a_sum_is_narrowed_once() -> None:
    x, y = blocks(drawn(30, 32, seed=1)), blocks(drawn(30, 32, seed=2))
    found, exact = x + y, values(x) + values(y)
    coarser = torch.minimum(x.each(), y.each())
    most = torch.where(found.codes.abs() == 127, 1, 0.5) * power_of_two(-found.each()) + power_of_two(-coarser - 8)
    assert bool(((values(found) - exact).abs() <= most).all())
    assert same(found, simulated(x) + simulated(y))


# ---------------------------------------------------------------------------------------------------- as tensors
def test_views_keep_values() -> None:
    x = blocks(drawn(2, 3, 32), 16)
    heads = x.view(2, 3, -1, 8).transpose(1, 2)
    assert torch.equal(values(heads), values(x).view(2, 3, 4, 8).transpose(1, 2)) and heads.strip == 8
    back = heads.transpose(1, 2).reshape(2, 3, -1).contiguous()
    assert torch.equal(values(back), values(x)) and torch.equal(values(x[:, 0]), values(x)[:, 0])
    cached = torch.cat([heads, heads], dim=-2)
    assert isinstance(cached, Blocks) and torch.equal(values(cached), torch.cat([values(heads)] * 2, -2))
    assert functional.dropout(x, 0.5, training=False) is x
    thirds = blocks(drawn(2, 3, 48), 16).split(24, dim=2)
    assert [part.strip for part in thirds] == [8, 8] and torch.equal(
        torch.cat([values(part) for part in thirds], -1), values(blocks(drawn(2, 3, 48), 16))
    )
    assert torch.equal(values(x[:, slice(-1, None), :]), values(x)[:, -1:]) and x.to("cpu").strip == 16


def test_anything_else_is_refused_by_name() -> None:
    x = blocks(drawn(2, 3, 32))
    with pytest.raises(ModelError, match="can't follow sigmoid"):
        torch.sigmoid(x)
    with pytest.raises(ModelError, match="can't follow dropout"):
        functional.dropout(x, 0.5, training=True)
    with pytest.raises(ModelError, match="not to a float"):
        x + 1.0
    with pytest.raises(ModelError, match="last dimension"):
        x.transpose(1, 2)
    with pytest.raises(ModelError, match="leading dimensions"):
        x[..., 0]
    with pytest.raises(ModelError, match="no other type"):
        x.to(torch.float32)
    with pytest.raises(ModelError, match="last dimension only"):
        x.split(1, dim=1)


# ------------------------------------------------------------------------------------------------------------ products
def test_a_product_is_exact_where_no_bits_are_dropped() -> None:
    x, y = blocks(drawn(6, 32, spread=0)), blocks(drawn(5, 32, seed=3, spread=0))
    x = Blocks(x.codes, torch.full_like(x.shifts, 3), 8)
    y = Blocks(y.codes, torch.full_like(y.shifts, -2), 8)
    bias = torch.arange(-2, 3) * 1000
    sums, shifts = product(x, y, (bias, torch.ones(5, dtype=torch.int64)))
    wanted = x.codes.long() @ y.codes.long().T + bias
    assert torch.equal(sums, wanted) and set(shifts.flatten().tolist()) == {1}


def test_a_product_is_within_half_a_unit_a_strip() -> None:
    x, y = blocks(drawn(40, 64, seed=4)), blocks(drawn(30, 64, seed=5), 16)
    sums, shifts = product(x, y)
    exact = [
        [sum((Fraction(a) * Fraction(b) for a, b in zip(r, s, strict=True)), Fraction(0)) for s in values(y).tolist()]
        for r in values(x)[:4].tolist()
    ]
    off = [
        [abs(int(s) - e * Fraction(2) ** int(t)) for s, t, e in zip(*rows, strict=True)]
        for rows in zip(sums[:4].tolist(), shifts[:4].tolist(), exact, strict=True)
    ]
    worst = max(max(row) for row in off)
    assert 0.5 < worst <= 64 / 8 / 2
    each = x.each().view(40, 1, 8, 8)[..., 0] + y.each().view(1, 30, 8, 8)[..., 0]
    assert torch.equal(shifts, each.amin(-1)) and int(sums.abs().max()) < 64 * 127 * 127
    again, same_shifts = product(simulated(x), simulated(y))
    assert torch.equal(again.long(), sums) and torch.equal(shifts, same_shifts)


def test_columns_that_could_overflow_are_refused() -> None:
    check_columns(90_000, 8, "fc")
    with pytest.raises(SchemeError, match=r"fc: sums of 130,000.*32-bit"):
        check_columns(130_000, 8, "fc")
    check_columns(130_000, 4, "fc")


# ----------------------------------------------------------------------------------------------------------- functions
@pytest.mark.parametrize("function", [functional.gelu, torch.tanh, torch.relu, functional.silu])
@pytest.mark.parametrize("shift", [-3, 0, 4, 6, 12, 30])
def test_a_table_is_the_rounded_function_of_every_code(function: Any, shift: int) -> None:
    codes = torch.arange(-127, 128, dtype=torch.int8).view(1, -1)
    table = BlockTable(function)
    q, t = table.looked_up(Blocks(codes, torch.full((1, 1), shift, dtype=torch.int8), 255))
    exact = function(codes.double() * 2.0**-shift)
    assert len(set(t.flatten().tolist())) == 1 and int(q.abs().max()) >= 2**14
    assert torch.equal(q, torch.floor(exact * power_of_two(t) + 0.5).clamp(1 - 2**15, 2**15 - 1).long())
    x = blocks(drawn(20, 32))
    assert same(table(x), table(simulated(x)))


def test_strips_finer_than_all_tables_are_shifted_first() -> None:
    x = Blocks(torch.tensor([[127, -64]], dtype=torch.int8), torch.tensor([[35]], dtype=torch.int8), 8)
    assert torch.allclose(values(BlockTable(functional.gelu)(x)), values(x) / 2, rtol=0, atol=2.0**-33)


def test_softmax_rows_sum_to_one_and_what_is_not_seen_is_zero() -> None:
    q = torch.randint(-3000, 3000, (4, 40, 50), generator=torch.Generator().manual_seed(1))
    shifts = torch.randint(6, 10, (4, 1, 50), generator=torch.Generator().manual_seed(2)).expand(q.shape)
    seen = (torch.arange(50) <= torch.arange(40)[:, None]).expand(4, 40, 50)
    found = block_softmax(q, shifts, 0.3, seen)
    exact = torch.softmax((0.3 * q.double() * power_of_two(-shifts)).masked_fill(~seen, -torch.inf), -1)
    assert bool((found[~seen] == 0).all()) and ((found / 2**16) - exact).abs().max() < 2e-3
    assert ((found.sum(-1) - 2**16).abs() <= 50 / 2).all()
    assert torch.equal(block_softmax(q.double(), shifts, 0.3, seen).long(), found)
    far = torch.where(seen, q, 10**6)  # takes no part in maximum or shift
    assert torch.equal(block_softmax(far, torch.where(seen, shifts, -20), 0.3, seen), found)
    assert int(block_softmax(q, shifts, 0.3, torch.zeros_like(seen)).abs().max()) == 0


def test_layer_norm() -> None:
    made = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(64, generator=made) + 2, torch.randn(64, generator=made)
    norm, x = BlockNorm(weight, bias, 1e-5, 8), blocks(drawn(50, 64, spread=0.5))
    wanted = functional.layer_norm(values(x), (64,), weight.double(), bias.double(), 1e-5)
    found = norm(x)
    most = torch.where(found.codes.abs() == 127, 1, 0.5)  # of a unit; beside it 2^-15 of norms, times weights
    assert ((values(found) - wanted).abs() <= power_of_two(-found.each()) * most + 1e-3).all()
    assert same(found, norm(simulated(x)))
    plain = BlockNorm(torch.ones(64), torch.zeros(64), 1e-5, 8)(x)
    assert values(plain).mean(-1).abs().max() < 0.01 and (values(plain).square().mean(-1) - 1).abs().max() < 0.02
    flat = Blocks(torch.full((1, 64), 5, dtype=torch.int8), torch.zeros((1, 8), dtype=torch.int8), 8)
    assert torch.allclose(values(norm(flat)), bias.double()[None], atol=0.02)


@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_a_row_smaller_than_eps_stays_small(eps: float) -> None:
    x = blocks(drawn(3, 64, spread=0.1) * 2.0**-8)
    small = Blocks(x.codes, x.shifts + 8, 8)
    wanted = functional.layer_norm(values(small), (64,), None, None, eps)
    found = values(BlockNorm(torch.ones(64), torch.zeros(64), eps, 8)(small))
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    smaller = Blocks(x.codes, x.shifts + 40, 8)
    wanted = functional.layer_norm(values(smaller), (64,), None, None, eps)
    found = values(BlockNorm(torch.ones(64), torch.zeros(64), eps, 8)(smaller))
    assert (found - wanted).abs().max() < 2.0**-15


def test_a_norm_that_holds_no_numbers_is_refused() -> None:
    with pytest.raises(DataError, match=r"finite and below 2\^19"):
        BlockNorm(torch.full((8,), float("nan")), torch.zeros(8), 1e-5, 8)
    zeros = BlockNorm(torch.zeros(8), torch.arange(8.0), 1e-5, 8)(blocks(drawn(2, 8)))
    assert torch.equal(values(zeros), torch.arange(8.0).double().expand(2, 8))
