"""Code books given by values or made from data: number-formats sheet, section 14 (scalar)."""

from __future__ import annotations

import pytest
import torch

from nybble.core.errors import DataError, FormatError
from nybble.formats import get_format
from nybble.formats.table import kmeans_format, quantile_format, table_format
from nybble.quantizer import Quantizer


def test_the_name_carries_the_table() -> None:
    fmt = table_format([-1, -0.3, 0, 0.3, 1])
    assert fmt.bits == 3 and get_format(fmt.name) == fmt
    assert get_format("table[-1,0,1]").grid.tolist() == [-1, 0, 1]
    x = torch.randn(4, 8)
    q = Quantizer(f"{fmt.name} group=8")
    assert Quantizer(str(q)) == q and torch.equal(q.quantize(x).dequantize(), q.fake_quantize(x))


def test_codes_follow_the_order_given() -> None:
    fmt = get_format("table[1,-1,0.5,0]")
    assert fmt.grid.tolist() == [-1, 0, 0.5, 1] and fmt.grid_codes.tolist() == [1, 3, 2, 0]


def test_quantiles_are_equally_likely() -> None:
    x = torch.randn(100_000)
    fmt = quantile_format(x, 4)
    codes = Quantizer(f"{fmt.name} tensor scale=absmax(target=1)").quantize(x).unpacked()
    share = torch.bincount(codes.flatten().long(), minlength=16) / x.numel()
    # Cells end at midpoints between quantiles, not at quantiles: wide at the tails.
    assert share.min() > 0.02 and share.max() < 0.12


def test_kmeans_is_a_fixed_point_and_better_than_its_start() -> None:
    x = torch.randn(20_000).double().pow(3).float()
    start, found = quantile_format(x, 3), kmeans_format(x, 3)

    def loss(name: str) -> float:
        return float((Quantizer(f"{name} scale=absmax(target=1)").fake_quantize(x) - x).square().mean())

    assert loss(found.name) < loss(start.name)
    y = x / x.abs().max()
    nearest = (y[:, None] - torch.from_numpy(found.grid).float()).abs().argmin(1)
    centres = torch.stack([y[nearest == i].double().mean() for i in range(8)])
    assert torch.allclose(centres, torch.from_numpy(found.grid), atol=2e-3)


@pytest.mark.parametrize(
    "text", ["table[1]", "table[1,1]", "table[1,x]", "table[1,inf]", f"table[{','.join(map(str, range(257)))}]"]
)
def test_impossible(text: str) -> None:
    with pytest.raises(FormatError):
        get_format(text)


@pytest.mark.parametrize("x", [torch.zeros(0), torch.ones(9), torch.tensor([1.0, torch.nan])])
def test_data_that_makes_no_book(x: torch.Tensor) -> None:
    with pytest.raises(DataError, match="quantile"):
        quantile_format(x, 4)
