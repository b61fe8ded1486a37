"""Scales once more, with the codes fixed: those that lose least at the layer's output.

With W_hat = S V + o, V the codes' values and one scale a block, the output error ``tr((W - W_hat) H (W - W_hat)^T)``,
``H = E[x x^T]``, is quadratic in the scales. (Where a recipe runs both paths: ``E|W x_float - W_hat x|^2``, against
the float network's outputs, with one more linear term; then layers are refined in the order of their calls, each on
what those before it give by now.) Scales are visited block by block, and each takes its exact
optimum with the others where they are,

    s_b <- s_b + <V_b, (W - W_hat) H> / tr(V_b H V_b^T)

rounded to the format that stores it; it moves only where the error falls by the stored value. So what one scale loses
in its own rounding the later ones make up for, and the error never rises. Blocks that share no row don't touch each
other and move at once; a few sweeps over all of them come to rest. Codes, zero points, offsets and outer scales stay.

After any method that leaves codes with a scale a block (RTN, GPTQ, learned rounding), in any format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from nybble.calibration.error import Drift, by_group, relative_error
from nybble.calibration.watch import find_groups, layer_moments
from nybble.calibration.window import Window
from nybble.core.errors import DataError, SchemeError
from nybble.corrections import Correction
from nybble.nn.kinds import Target
from nybble.nn.layer import QuantLayer
from nybble.nn.packed import Packed
from nybble.qtensor import QTensor, QuantParams, dense
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer


@dataclass(frozen=True, kw_only=True)
class RefineScales(Correction):
    """Options of the method.

    Attributes:
        sweeps: over all scales at most; fewer where one moves none.
        alpha: where a recipe runs both paths, the share of what inputs have lost that scales make up for.
    """

    reads_inputs: ClassVar[bool] = True

    sweeps: int = 4
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise SchemeError(f"refine-scales: sweeps={self.sweeps}; at least one.")
        if not 0 <= self.alpha <= 1:
            raise SchemeError(f"refine-scales: alpha={self.alpha:g} is a share, 0 <= alpha <= 1.")

    def can_take(self, target: Target) -> bool:  # noqa: D102
        return target.kind.shares_input and target.rule.weights is not None

    def run(self, window: Window, targets: Sequence[Target], path: str) -> None:  # noqa: D102
        for together in self._stages(window, targets, path):
            self._correct_all(window, together, path)

    @staticmethod
    def _stages(window: Window, targets: Sequence[Target], path: str) -> Sequence[Sequence[Target]]:
        """Those that are looked at together: of both paths, layers that read the same, in the order of their calls."""
        if not {"float", "quantized"} <= window.calibration.paths:
            return [targets]
        call, given = next(iter(window.batches(path)()))
        with window.block.on("float") as block:
            groups, uncalled = find_groups(block, targets, call, given)
        return [*(group.members for group in groups), [t for t in targets if (t.head or t.name) in uncalled]]

    def _correct_all(self, window: Window, targets: Sequence[Target], path: str) -> None:
        layers = {}
        for target in targets:
            layer = window.block.installed(target)
            assert isinstance(layer, QuantLayer) and isinstance(layer.weight, Packed)
            inputs = (None, None) if layer.inputs is None else (layer.inputs.quantizer, layer.inputs.params())
            layers[target.name] = (target, inputs)
        moments, drifts = layer_moments(window, path, layers) if layers else ({}, {})
        for target in targets:
            moment, drift = moments.pop(target.name, None), drifts.pop(target.name, None)
            second = None if moment is None else moment.mean(f"{window.block.prefix}{target.name}")
            self._correct(window, target, second, None if drift is None else drift.mean())

    def _correct(self, window: Window, target: Target, second: Tensor | None, drift: Drift | None) -> None:
        layer, record = window.block.installed(target), window.block.records[target.name]
        assert isinstance(layer, QuantLayer) and isinstance(layer.weight, Packed)
        truth, base, quantizer = window.block.matrix(target).float(), layer.weight.qtensor(), record.quantizer
        if second is None or quantizer is None or not movable(base, quantizer):
            why = "no calibration input reached it" if second is None else f"{base.kind} without a scale a block"
            record.notes.append(f"{why}: its scales stay")
            return
        assert isinstance(base, BlockQTensor)
        aim = None if drift is None else drift.share(self.alpha)
        found = refined(truth, base, quantizer, second, self.sweeps, aim)
        before = relative_error(truth, base.dequantize(), second, aim)
        after = relative_error(truth, found.dequantize(), second, aim)
        if not after < before:
            record.notes.append(f"its scales are the best for its codes (output error {before:.3g})")
            return
        layer.weight = Packed(found, layer.weight.dtype)
        plain = quantizer.quantize(truth)
        record.error, record.rtn_error = (relative_error(truth, x.dequantize(), second, drift) for x in (found, plain))
        record.notes.append(f"scales refined: output error {before:.3g} -> {after:.3g}")

    def flops(self, rows: int, columns: int) -> float:
        """A product with the second moment for each sweep, and another for the blocks themselves."""
        return 4.0 * self.sweeps * rows * columns**2

    def working_bytes(self, rows: int, columns: int) -> int:
        """Three moments of three layers that read the same, one to add, and nine copies of the weight."""
        return 40 * columns**2 + 36 * rows * columns


def movable(tensor: QTensor, quantizer: Quantizer) -> bool:
    """Whether a tensor is codes with plain scales a block, stored as the quantizer stores them."""
    if not isinstance(tensor, BlockQTensor) or not isinstance(tensor.params.scale, Tensor | QTensor):
        return False
    if quantizer.format != tensor.format or quantizer.granularity != tensor.granularity:
        return False
    try:
        again = quantizer.pack(tensor.unpacked(), quantizer.soften(tensor.params))
    except (DataError, SchemeError):  # its scales are kept in another format than the quantizer's
        return False
    stored = tensor.tensors()
    return again.spec() == tensor.spec() and all(torch.equal(stored[k], t) for k, t in again.tensors().items())


def refined(
    matrix: Tensor,
    base: BlockQTensor,
    quantizer: Quantizer,
    second: Tensor,
    sweeps: int,
    drift: Drift | None = None,
) -> BlockQTensor:
    """The same codes under better scales.

    Args:
        matrix: W, float32 [rows, columns].
        base: what it was rounded to; :func:`movable`.
        quantizer: how it is stored.
        second: H, float32 [columns, columns], or [groups, columns, columns].
        sweeps: at most.
        drift: of the inputs from the float network's; None where W is judged on what it gets.
    """
    raw = quantizer.soften(base.params)
    assert isinstance(raw.scale, Tensor)
    params = QuantParams(None, zero_point=base.params.zero_point, grid=base.params.grid)
    values, lost = replace(base, params=params).dequantize(), matrix - base.dequantize()
    shape, scale = raw.scale.shape, raw.scale.reshape(-1).clone()

    def stored(scales: Tensor) -> Tensor:
        found = quantizer.harden(replace(raw, scale=scales.view(shape))).scale
        assert isinstance(found, Tensor | QTensor)
        return dense(found).reshape(-1)

    pull = torch.zeros_like(matrix) if drift is None else (by_group(matrix, second) @ drift.cross).view_as(matrix)
    now = stored(scale)
    parts = list(_apart(base))
    for _ in range(sweeps):
        moved = False
        for owner, rows, columns in parts:
            value = torch.where(owner == rows[:, None], values[:, columns], 0)
            slope = (by_group(lost, second) @ second[..., columns]).reshape(value.shape) + pull[:, columns]
            power = (by_group(value, second) @ second[..., columns, :][..., columns]).reshape(value.shape)
            gain, weight = (_by_block((value * x).sum(1), rows, len(scale)) for x in (slope, power))
            wanted = quantizer.scale.allowed((now + (gain / weight).float()).clamp_min(0))
            wanted = torch.where(torch.isfinite(wanted) & (wanted > 0), wanted, scale)
            there = stored(torch.where(weight > 0, wanted, scale))
            step = there.double() - now.double()
            falls = (2 * step * gain - step.square() * weight > 0) & (there > 0)
            if not bool(falls.any()):
                continue
            moved, scale = True, torch.where(falls, wanted, scale)
            step, now = torch.where(falls, step, 0).float(), torch.where(falls, there, now)
            lost[:, columns] -= torch.where(rows >= 0, step[rows.clamp_min(0)], 0)[:, None] * value
        if not moved:
            break
    return quantizer.pack(base.unpacked(), replace(raw, scale=scale.view(shape)))


def _apart(base: BlockQTensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Blocks in parts in which no two have a row in common.

    Yields:
        which block each element of the part's columns belongs to, int64 [rows, columns]; which block of the part each
        row has, int64 [rows], -1 for none; the columns, int64.
    """
    view, shape = base.granularity, base.shape
    count = view.scale_shape(shape)
    numbers = torch.arange(torch.Size(count).numel(), device=base.codes.device).view(count)
    owner = view.expand(numbers, shape).expand(shape)
    # Blocks are numbered in row-major order: those of one row lie in a run, and every width-th of them is apart.
    width = int((owner.amax(1) - owner.amin(1)).max()) + 1
    for part in range(width):
        inside = owner % width == part
        rows = torch.where(inside, owner, -1).amax(1)
        columns = inside.any(0).nonzero()[:, 0]
        yield owner[:, columns], rows, columns


def _by_block(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Sums of rows' values by their block, float64 [count]."""
    there = rows >= 0
    total = torch.zeros(count, dtype=torch.float64, device=values.device)
    return total.index_put_((rows[there],), values[there].double(), accumulate=True)


PART = RefineScales
