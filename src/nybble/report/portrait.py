"""What a layer looked like: histograms of its weights and inputs as the rounder saw them, and its input's channels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nybble.qtensor import Factored, Inverse, QTensor, QuantParams, block_view
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer

BINS = 64
_PART = 1 << 22
"""Values counted at once: fewer than float32 can count."""
LEVELS = 16
"""Of a format with more, thresholds are too many to draw."""
SAMPLE = 1024
"""Tokens of an input that are looked at."""


def weight_picture(matrix: Tensor, found: QTensor, thresholds: bool = False) -> dict[str, Any] | None:
    """Histogram of a weight over its scales (and zero points), where the format's grid can be drawn on it.

    Args:
        matrix: float32 [rows, columns].
        found: its quantized version; only one with blocks has a picture.
        thresholds: also say where values go to the next level (:func:`_thresholds`), of up to 16.
    """
    if not isinstance(found, BlockQTensor):
        return None
    quantizer = Quantizer(f"{found.format.name} {found.granularity}")
    picture = _on_grid(matrix, found.params, quantizer)
    if thresholds and len(found.format.grid) <= LEVELS:
        values, levels = (_in_units(x, found.params, quantizer) for x in (matrix, found.dequantize()))
        picture["thresholds"] = _thresholds(values, levels, [float(level) for level in found.format.grid])
    return picture


def input_picture(sample: Tensor, quantizer: Quantizer | None, params: QuantParams | None) -> dict[str, Any]:
    """Histogram of an input as its quantizer saw it, and how its channels differ.

    Args:
        sample: [tokens, columns].
        quantizer: None where the input stays in float; the histogram is then over the largest magnitude.
        params: of a static quantizer.

    Returns:
        ``histogram`` (:func:`_histogram`); ``inter`` and ``intra``: variance of the channels' mean magnitudes, and mean
        over channels of the variance of their magnitudes, both over the mean square of all; ``channels``: largest and
        mean magnitude of up to 64 channels, spread evenly from the loudest to the quietest.
    """
    x = sample.float()
    magnitude = x.abs()
    power = float(x.square().mean()) or 1.0
    loudest, means = magnitude.amax(0), magnitude.mean(0)
    order = loudest.argsort(descending=True)
    shown = order[torch.linspace(0, len(order) - 1, min(BINS, len(order)), device=order.device).round().long()]
    if quantizer is None:
        histogram = _histogram(x / magnitude.max().clamp(min=1e-30), 1.0)
    else:
        histogram = _on_grid(x, params or quantizer.fit(x), quantizer)
    return {
        "histogram": histogram,
        "inter": _short(float(means.var(correction=0)) / power),
        "intra": _short(float(magnitude.var(0, correction=0).mean()) / power),
        "channels": [[_short(a), _short(b)] for a, b in torch.stack([loudest, means], 1)[shown].tolist()],
    }


def _on_grid(x: Tensor, params: QuantParams, quantizer: Quantizer) -> dict[str, Any]:
    y, fmt = _in_units(x, params, quantizer), quantizer.format
    if fmt.bits > 8:  # too many values to draw, and too far to see any
        return _histogram(y / (float(y.abs().max()) or 1.0), 1.0)
    return _histogram(y, fmt.absmax) | {"format": fmt.name}


def _in_units(x: Tensor, params: QuantParams, quantizer: Quantizer) -> Tensor:
    """What the grid's values are compared with: less offsets, over scales, in blocks."""
    granularity, shape = quantizer.granularity, tuple(x.shape)
    y = granularity.to_blocks(x)
    if params.offset is not None:
        y = y - block_view(params.offset, granularity, shape)
    if isinstance(params.scale, Inverse):
        y = y * block_view(params.scale, granularity, shape)
    elif isinstance(params.scale, Factored) or params.scale is not None:
        y = y / block_view(params.scale, granularity, shape)
    if params.zero_point is not None:
        y = y + block_view(params.zero_point, granularity, shape)
    return y


def _thresholds(y: Tensor, rounded: Tensor, grid: list[float]) -> list[list[float]]:
    """Between neighbouring levels, [low, high]: below all values went to the lower one, above all to the upper one.

    One number where all blocks have a threshold at the same place of the grid; pairs of levels that hold all values on
    one side are left out.
    """
    levels = torch.tensor(grid, dtype=torch.float32, device=y.device).sort().values
    real = y.isfinite() & rounded.isfinite()
    y, place = y[real].float(), torch.bucketize(rounded[real].float(), (levels[1:] + levels[:-1]) / 2)
    limits = torch.full((2, len(levels)), torch.inf, device=y.device)
    least = limits[0].scatter_reduce(0, place, y, "amin").flip(0).cummin(0).values.flip(0)
    most = (-limits[1]).scatter_reduce(0, place, y, "amax").cummax(0).values
    found = [sorted(pair) for pair in zip(most[:-1].tolist(), least[1:].tolist(), strict=True)]
    return [[_short(low), _short(high)] for low, high in found if math.isfinite(low) and math.isfinite(high)]


def _histogram(y: Tensor, top: float) -> dict[str, Any]:
    """Counts of 64 bins over -1.25 top .. 1.25 top, values beyond in the last ones; ``clipped``: share above top."""
    edge = 1.25 * top
    flat = y.reshape(-1).nan_to_num()
    counts = torch.zeros(BINS, dtype=torch.int64)
    for part in torch.split(flat, _PART):
        counts += _counts(part.clamp(-edge, edge).float(), edge)
    clipped = float((flat.abs() > top).float().mean())
    return {"edge": edge, "counts": counts.tolist(), "clipped": _short(clipped)}


def _counts(flat: Tensor, edge: float) -> Tensor:
    """int64 [BINS], on the CPU; counted where the values are, as a large weight takes longer to bring over."""
    if flat.device.type == "cpu":
        return torch.histc(flat, BINS, -edge, edge).long()
    return _binned(flat, edge).cpu()


def _binned(flat: Tensor, edge: float) -> Tensor:
    """int64 [BINS], where the values are."""
    bins = ((flat + edge) * (BINS / (2 * edge))).long().clamp_(0, BINS - 1)  # histc has no deterministic kernel there
    return torch.bincount(bins, minlength=BINS)


def _short(value: float) -> float:
    """Four digits: a picture needs no more, and the file stays small."""
    return float(f"{value:.4g}")
