"""Latency: what is timed is the packed layer; each shape and format once; kept numbers win over the clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from nybble.core.errors import SchemeError
from nybble.costs import Sized, latency, make_cost
from nybble.nn.packed import Packed
from nybble.quantizer import Quantizer

FOUR, EIGHT = Quantizer("int4 group=32"), Quantizer("int8 group=32")


def test_each_shape_format_and_rows_is_timed_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []

    def clock(layer: Any, x: torch.Tensor, calls: int) -> float:
        seen.append((tuple(layer.weight.shape), tuple(x.shape), calls))
        return 0.002 * len(seen)

    monkeypatch.setattr(latency, "seconds", clock)
    known: dict[str, list[float]] = {}

    def keep(key: str, measure: Callable[[], list[float]]) -> list[float]:
        if key not in known:
            known[key] = measure()
        return known[key]

    cost = make_cost("latency").here("cpu", keep)
    layers = [Sized(name=name, shape=(8, 64)) for name in "ab"]
    assert [cost.of(layer, FOUR) for layer in layers] == [2_000_000, 2_000_000]
    assert cost.of(layers[0], EIGHT) == 4_000_000
    assert cost.of(Sized(name="c", shape=(8, 64), rows=5), FOUR) == 6_000_000
    assert cost.of(Sized(name="d", shape=(8, 64), inputs=Quantizer("int8 token")), FOUR) == 8_000_000
    assert seen == [((8, 64), (rows, 64), 21) for rows in (1, 1, 5, 1)]
    again = make_cost("latency").here("cpu", keep)
    assert again.of(layers[1], EIGHT) == 4_000_000 and len(seen) == 4
    assert cost.limit(2.3, layers) == 2_300_000 and cost.shown(2_300_000, layers) == 2.3


@pytest.mark.parametrize("inputs", [None, "int8 token"])
def test_what_is_timed_is_the_packed_product(inputs: str | None) -> None:
    """By a kernel, and the numbers of the dequantized weight."""
    size = Sized(name="a", shape=(256, 128), inputs=None if inputs is None else Quantizer(inputs))
    layer, x = latency.timed_layer(size, FOUR, 3, "cpu")
    assert isinstance(layer.weight, Packed)
    assert layer.how()[0], layer.how()
    assert x.shape == (3, 128) and x.dtype == torch.bfloat16
    entering = x if layer.inputs is None else layer.inputs(x)
    wanted = functional.linear(entering.double(), layer.weight(torch.float32).double())
    found = layer(x).double()
    assert (found - wanted).norm() <= 2.0**-7 * wanted.norm()  # bfloat16 in, and out


def test_other_layers_are_refused() -> None:
    with pytest.raises(SchemeError, match=r"conv is no linear layer.*bytes or bops"):
        make_cost("latency").of(Sized(name="conv", shape=(8, 64), linear=False), FOUR)
