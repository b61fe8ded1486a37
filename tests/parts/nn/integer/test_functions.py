"""Integer functions against torch's in float64: within the errors of their polynomials and their codes' steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nybble.core.errors import DataError
from nybble.nn.integer.erf import integer_erf
from nybble.nn.integer.exp import integer_exp
from nybble.nn.integer.gelu import integer_gelu
from nybble.nn.integer.layer_norm import integer_layer_norm, integer_sqrt
from nybble.nn.integer.sigmoid import integer_sigmoid, integer_swish
from nybble.nn.integer.softmax import integer_softmax
from nybble.nn.integer.table import Table

FINE = 2.0**-12


def codes(low: float, high: float, scale: float) -> Tensor:
    return torch.arange(math.ceil(low / scale), math.floor(high / scale) + 1)


def whole(found: tuple[Tensor, float | Tensor]) -> Tensor:
    assert found[0].dtype == torch.int64
    return found[0] * found[1]


def test_exp() -> None:
    q = codes(-math.log(2) + FINE, 0, FINE)
    error = (whole(integer_exp(q, FINE)) - torch.exp(q * FINE)).abs().max()
    assert 1.5e-3 < error < 1.95e-3 + 2 * FINE  # the polynomial's own, 1.9e-3, and floors of its coefficients
    far = codes(-12, 0, FINE)
    relative = whole(integer_exp(far, FINE)) / torch.exp(far * FINE) - 1
    assert relative.abs().max() < 5e-3


@pytest.mark.parametrize("scale", [2.0**-15, 2.0**-9, 0.013, 0.3, math.log(2)])
def test_exp_keeps_one_in_31_bits_at_any_scale(scale: float) -> None:
    value, fine = integer_exp(torch.tensor([0, -1, -(2**31)]), scale)
    assert 2**30 <= int(value[0]) < 2**31
    assert int(value[1]) <= int(value[0])
    assert float(value[0] * fine) == pytest.approx(1, abs=0.36 * scale**2 + 1e-9)
    assert 0 <= float(value[2] * fine) < 2.0**-29


def test_erf_and_gelu() -> None:
    q = codes(-6, 6, FINE)
    x = q * FINE
    erf = (whole(integer_erf(q, FINE)) - torch.erf(x.double())).abs().max()
    assert 0.09 < erf < 0.0965
    gelu = (whole(integer_gelu(q, FINE)) - functional.gelu(x.double())).abs().max()
    assert 0.015 < gelu < 0.0195


def test_sigmoid_and_swish() -> None:
    q = codes(-8, 8, FINE)
    x = (q * FINE).double()
    for bits in (8, 15):
        y = whole(integer_sigmoid(q, FINE, bits))
        assert (y - torch.sigmoid(x)).abs().max() < 1.2e-3 + 2.0**-bits
        assert (whole(integer_swish(q, FINE, bits)) - functional.silu(x)).abs().max() < 8 * (1.2e-3 + 2.0**-bits)


@pytest.mark.parametrize("bits", [8, 16])
def test_softmax(bits: int) -> None:
    q = torch.randint(-3000, 3000, (50, 64), generator=torch.Generator().manual_seed(1))
    y = whole(integer_softmax(q, FINE * 8, 1, bits))
    assert (y - torch.softmax(q.double() * FINE * 8, 1)).abs().max() < 2e-3 + 2.0**-bits
    assert ((y.sum(1) - 1).abs() <= 64 * 2.0**-bits / 2 + 2.0**-bits).all()
    alone, scale = integer_softmax(torch.tensor([[5]]), 0.1, 1, bits)
    assert (int(alone), scale) == (2**bits - 1, 2.0**-bits)


def test_layer_norm() -> None:
    drawn = torch.Generator().manual_seed(2)
    q = torch.randint(-20000, 20000, (30, 192), generator=drawn)
    weight, bias = torch.randn(192, generator=drawn).double() + 3, torch.randn(192, generator=drawn).double()
    y = whole(integer_layer_norm(q, 1e-3, weight, bias))
    wanted = functional.layer_norm(q.double() * 1e-3, (192,), weight, bias, 1e-5)
    assert (y - wanted).abs().max() < 1e-3  # of a mean that is off by half a code in 11,500
    flat = whole(integer_layer_norm(torch.full((1, 192), 7), 1e-3, weight, bias))
    assert torch.allclose(flat, bias[None], atol=1e-6)


def test_square_roots_are_floors() -> None:
    n = torch.tensor(
        [0, 1, 2, 3, 4, 15, 16, 10**9, 2**31, 2**60 - 1, 2**60, 2**62 - 1, (2**31 - 1) ** 2, (2**31 - 1) ** 2 - 1]
    )
    assert integer_sqrt(n).tolist() == [math.isqrt(k) for k in n.tolist()]


def test_tables_hold_the_function_of_every_code() -> None:
    table = Table.of(torch.nn.functional.gelu, 0.05, (-128, 127))
    q = torch.arange(-128, 128)
    y, scale = table(q)
    wanted = functional.gelu(q.double() * 0.05)
    assert (y * scale - wanted).abs().max() <= scale / 2 * (1 + 1e-9)
    assert int(y.max()) == 127
    assert torch.equal(table(torch.tensor([-500, 500]))[0], y[[0, -1]])


def test_what_integers_cant_hold_is_refused() -> None:
    for scale in (2.0**-16, 0.7):
        with pytest.raises(DataError, match="integer exponential"):
            integer_exp(torch.tensor([0]), scale)
    with pytest.raises(DataError, match="integer erf"):
        integer_erf(torch.tensor([0]), 2.0**-25)
    one = torch.ones(4)
    with pytest.raises(DataError, match="codes below"):
        integer_layer_norm(torch.tensor([[2**20, 0, 0, 0]]), 0.1, one, one)
    with pytest.raises(DataError, match="other than 0"):
        integer_layer_norm(torch.tensor([[1, 0, 0, 0]]), 0.1, one * 0, one)
    with pytest.raises(DataError, match="entries"):
        Table.of(torch.exp, 1.0, (0, 2**16))
    with pytest.raises(DataError, match="finite"):
        Table.of(torch.log, 1.0, (-1, 3))
