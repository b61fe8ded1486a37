"""Histograms of a layer: both ways of counting, and values beyond the edges."""

from __future__ import annotations

import torch

from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.report.portrait import BINS, _binned, _counts, _histogram, weight_picture


def test_a_device_counts_as_the_cpu_does() -> None:
    middles = (torch.arange(BINS) + 0.5) * (2 * 7.5 / BINS) - 7.5
    x = torch.cat([middles.repeat_interleave(torch.arange(1, BINS + 1)), torch.tensor([-7.5, 7.5])])
    assert torch.equal(_binned(x, 7.5), _counts(x, 7.5))
    expected = torch.arange(1, BINS + 1)
    expected[0], expected[-1] = 2, BINS + 1  # the edges themselves
    assert torch.equal(_binned(x, 7.5), expected)


def test_values_beyond_the_edges_are_in_the_last_bins() -> None:
    found = _histogram(torch.tensor([-100.0, -6.0, 0.5, 100.0, 200.0]), 6.0)
    assert (found["counts"][0], found["counts"][-1], sum(found["counts"])) == (1, 2, 5)
    assert found["clipped"] == 0.6


def test_thresholds_lie_where_values_go_to_the_next_level() -> None:
    """Of rounding to nearest half way; codes that were chosen otherwise move one, and a block of its own widens it."""
    x = torch.linspace(-3, 3, 601).reshape(1, -1)
    packed = Quantizer("int3 channel").quantize(x)
    assert isinstance(packed, BlockQTensor)
    assert isinstance(packed.params.scale, torch.Tensor)
    unit = float(packed.params.scale)
    picture = weight_picture(x, packed, thresholds=True)
    assert picture is not None and "thresholds" not in (weight_picture(x, packed) or {})
    found = picture["thresholds"]
    assert len(found) == 6
    halves = [k + 0.5 for k in range(-3, 3)]
    assert all(low - 1e-3 <= half <= high + 1e-3 for (low, high), half in zip(found, halves, strict=True))
    assert all(high - low < 0.02 / unit for low, high in found)
    moved = weight_picture(x + 0.25 * unit, packed, thresholds=True)
    assert moved is not None
    assert all(
        low - 1e-3 <= half + 0.25 <= high + 1e-3 for (low, high), half in zip(moved["thresholds"], halves, strict=True)
    )
    both = weight_picture(torch.cat([x, x + 0.25 * unit]), Quantizer("int3 tensor").quantize(torch.cat([x, x])), True)
    assert both is not None and all(high - low > 0.2 for low, high in both["thresholds"])
