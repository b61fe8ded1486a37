"""What learning did, as plain numbers: for the manifest's rows, from which the report draws."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nybble.core.curve import short
from nybble.nn.layer import QuantLayer
from nybble.nn.packed import Packed
from nybble.qtensor import QTensor, dense
from nybble.qtensor.block import BlockQTensor
from nybble.qtensor.outer_scaled import OuterScaled
from nybble.qtensor.split import SplitQTensor
from nybble.qtensor.vector import VectorQTensor, VectorQuantizer
from nybble.quantizer import Quantizer


def moves(weight: Tensor, quantizer: Quantizer | None, began: QuantLayer, settled: QuantLayer) -> dict[str, Any]:
    """How far a layer went from what the solver left.

    Args:
        weight: the float one, float32 [out, in].
        quantizer: what it is rounded with; None where it stays in float.
        began: the packed layer that its twin began from.
        settled: the one that it came to.

    Returns:
        Those that can be said, of a split tensor about the part that learned: ``left_nearest``, the share of weights
        that are not what rounding the float weight to nearest gives with the settled layer's own scales; ``scales`` and
        ``input_scales``, the smallest, median and largest ratio of a scale to what it was; ``zero_points``, the share
        of zero points that changed. Of a code book of vectors ``left_nearest`` is about its entries.
    """
    found: dict[str, Any] = {}
    if isinstance(began.weight, Packed) and isinstance(settled.weight, Packed) and quantizer is not None:
        for was, now, own in _pairs(began.weight.qtensor(), settled.weight.qtensor(), weight):
            nearest = quantizer.quantize(own, now.params).dequantize()
            found["left_nearest"] = short(float((now.dequantize() != nearest).float().mean()))
            found |= ratios("scales", was.params.scale, now.params.scale)
            if was.params.zero_point is not None and now.params.zero_point is not None:
                moved = dense(was.params.zero_point) != dense(now.params.zero_point)
                found["zero_points"] = short(float(moved.float().mean()))
        settled_to = settled.weight.qtensor()
        if isinstance(settled_to, VectorQTensor):
            found |= _left_nearest_entry(weight, began.weight.qtensor(), settled_to)
    if began.inputs is not None and settled.inputs is not None:
        before, after = began.inputs.params(), settled.inputs.params()
        if before is not None and after is not None:
            found |= ratios("input_scales", before.scale, after.scale)
    return found


def _pairs(
    was: QTensor | Tensor, now: QTensor | Tensor, weight: Tensor
) -> list[tuple[BlockQTensor, BlockQTensor, Tensor]]:
    """What can be compared: codes before and after, and the weight that they are of."""
    if isinstance(was, SplitQTensor) and isinstance(now, SplitQTensor):
        parts = zip(was.parts, now.parts, was.slices(), strict=True)
        moved = [(a, b, weight.index_select(was.dim, at)) for a, b, at in parts if a is not b]
        return [pair for a, b, own in moved for pair in _pairs(a, b, own)][:1]
    base = now.base if isinstance(now, OuterScaled) else now
    return [(was, base, weight)] if isinstance(was, BlockQTensor) and isinstance(base, BlockQTensor) else []


def _left_nearest_entry(weight: Tensor, was: QTensor, now: VectorQTensor) -> dict[str, Any]:
    """For a code book that learned; empty where it is what it was."""
    if was is now:
        return {}
    line = VectorQuantizer(k=len(now.codebook), d=now.codebook.shape[1])
    nearest = line.quantize(weight, now.codebook, None if now.scale is None else dense(now.scale))
    return {"left_nearest": short(float((nearest.index() != now.index()).float().mean()))}


def ratios(name: str, was: Any, now: Any) -> dict[str, list[float]]:
    """Smallest, median and largest ratio of scales, as ``name``; empty where they can't be compared."""
    if not all(isinstance(scale, Tensor | QTensor) for scale in (was, now)):
        return {}  # factors of a scale, or none
    before, after = dense(was).flatten(), dense(now).flatten()
    real = before != 0
    if before.shape != after.shape or not bool(real.any()):
        return {}
    ratio = (after[real] / before[real]).sort().values
    return {name: [short(float(ratio[place])) for place in (0, (len(ratio) - 1) // 2, -1)]}
