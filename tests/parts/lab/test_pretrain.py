"""Trainings from nothing with rounded operands: each operand reaches its own product alone, and models learn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_text

from nybble.core.errors import NybbleError
from nybble.lab.kinds.pretrain import Pretrain
from nybble.lab.six_products import OPERANDS, multiply, quantizer_of
from nybble.quantizer import Quantizer


def products(six: list[Quantizer | None]) -> tuple[torch.Tensor, ...]:
    x, w, dy = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(i))
        for i, shape in enumerate([(8, 16), (12, 16), (8, 12)])
    )
    x.requires_grad_()
    w.requires_grad_()
    y = multiply(x, w, six, torch.float32)
    y.backward(dy)  # type: ignore[no-untyped-call]
    assert x.grad is not None and w.grad is not None
    return y.detach(), x.grad, w.grad


def test_nothing_rounded_is_torchs_linear() -> None:
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(12, 16, requires_grad=True)
    ours = torch.autograd.grad(multiply(x, w, [None] * 6, torch.float32).square().sum(), (x, w))
    theirs = torch.autograd.grad(torch.nn.functional.linear(x, w).square().sum(), (x, w))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("number", range(6))
def test_an_operand_changes_its_own_product_alone(number: int) -> None:
    plain = products([None] * 6)
    found = products([quantizer_of(1, 1, 4) if i == number else None for i in range(6)])
    changed = [not torch.equal(a, b) for a, b in zip(plain, found, strict=True)]
    assert changed == [number // 2 == i for i in range(3)], OPERANDS[number]


def test_scales_run_along_the_axis_that_is_summed() -> None:
    """An output a million times the others has a scale of its own in P2, and drowns them in P4, summed over outputs."""
    x, w, dy = torch.randn(8, 16), torch.randn(12, 16), torch.zeros(8, 12)
    w[0], dy[:, 1] = w[0] * 1e6, 1.0

    def ran(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        given = x.clone().requires_grad_()
        y = multiply(
            given, w, [quantizer_of(2, 1, "channel") if i == number else None for i in range(6)], torch.float32
        )
        y.backward(dy)  # type: ignore[no-untyped-call]
        assert given.grad is not None
        return y.detach()[:, 1:], given.grad

    y, _ = ran(1)
    exact = x @ w[1:].T
    assert 0 < float((y - exact).norm() / exact.norm()) < 0.3
    _, dx = ran(3)
    assert not dx.any()


@pytest.mark.parametrize(("layout", "count"), [((2, 1), 15), ((1, 1), 7), ((0, 3), 15), ((1, 0), 3), ((4, 3), 255)])
def test_formats_spend_no_code_on_infinities(layout: tuple[int, int], count: int) -> None:
    """All values of a sign, E and M bits: 2^bits less the second zero."""
    largest = 2.0 ** (2 ** layout[0]) * 4
    grid = torch.cat(
        [torch.linspace(-1, 1, 200001), torch.logspace(-12, 0, 200000) / 1, -torch.logspace(-12, 0, 200000)]
    )
    found = torch.unique(quantizer_of(*layout, "channel").fake_quantize(grid[None] * largest))
    assert len(found) == count


@pytest.mark.parametrize("mantissa", [0, 1, 2])
def test_one_exponent_bit_is_a_mantissa_bit_more(mantissa: int) -> None:
    """Subnormals and the normals beside them are evenly spaced, so a law of E and M sees two formats in one."""
    x = torch.randn(64, 32)
    a, b = quantizer_of(1, mantissa, 32), quantizer_of(0, mantissa + 1, 32)
    assert torch.allclose(a.fake_quantize(x), b.fake_quantize(x), rtol=1e-6, atol=0)


def test_a_model_learns_and_few_bits_cost(tmp_path: Path) -> None:
    text = str(save_text(tmp_path / "t.txt", words=3000))
    sizes: dict[str, Any] = {"width": 32, "layers": 1, "tokens": 8192, "batch": 8, "seq_len": 32, "data": text}
    options: list[dict[str, Any]] = [{}, {}, {"format": "E1M0", "operands": "P1,P2,P3,P4,P5,P6"}]
    float_run, again, few = (Pretrain(**sizes, **more).run(tmp_path) for more in options)
    assert float_run == again and float_run["loss"] < few["loss"] < 5.6  # log 256 = 5.55 is knowing nothing
    assert float_run["N"] == 4 * 32 * 32 + 3 * 32 * 96 and float_run["D"] == 8192


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"width": 33}, "width is a multiple of 32"),
        ({"operands": "P2,P7"}, "got P7"),
        ({"format": "int4"}, "as E4M3 or bf16"),
        ({"dtype": "half"}, "dtype is float32 or bfloat16"),
        ({"tokens": 0}, "tokens"),
        ({"data": "./nothing.txt"}, "does not exist"),
    ],
)
def test_what_cannot_be_trained_is_illegal(options: dict[str, Any], word: str) -> None:
    with pytest.raises(NybbleError, match=re.escape(word)):
        Pretrain(**{"width": 32, "layers": 1, "tokens": 64, **options}).check()
