"""Histograms of a layer: both ways of counting, and values beyond the edges."""

from __future__ import annotations

import torch

from nybble.report.portrait import BINS, _binned, _counts, _histogram


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
