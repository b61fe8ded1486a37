"""Binarization scales: codes stay, and their scales learn: each block's, a factor for each row, one for each column.

    w_hat = (r x c) o (s code + m)          r [out, 1], c [1, in], both begin at 1; m, a block's mean, stays

The block-wise scaling factors of PTQ1.61 (Zhao et al. 2025, "PTQ1.61: Push the Real Limit of Extremely Low-Bit
Post-Training Quantization Methods for Large Language Models", arXiv:2502.13179), where codes are signs, s is alpha_s,
r alpha_r1 and c alpha_r2. The signs are those of the float weight and see no gradient, so no straight-through estimator
is needed. Of a split tensor the part in the scheme's quantizer learns: salient columns have no such factors.

What is stored are the base, whose scales (and means) have r in them where every block is in one row (``merge``; else,
and where ``merge`` is off as in the paper, r is stored too), and c. Scales that are quantized themselves have their own
scale measured anew whenever they have moved.

Where we differ: any format and granularity. Codes of a table or of integers with a zero point stay just so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nybble.learned import WEIGHTS, Learned, Part
from nybble.learned._held import Held
from nybble.line import PLAIN
from nybble.ops.blocks import narrow_scale
from nybble.ops.grid import Grid, straight_through
from nybble.qtensor import QTensor, QuantParams, dense
from nybble.qtensor.outer_scaled import OuterScaled
from nybble.quantizer import Quantizer


class AroundCodes(Learned):
    """See the module.

    Args:
        quantizer: the specification.
        x: the weight, whose codes stay.
        params: to begin with.
        options: of the part.
    """

    nearest = False

    def __init__(self, quantizer: Quantizer, x: Tensor, params: QuantParams, options: BinarizationScales) -> None:
        super().__init__(quantizer, WEIGHTS)
        self.options, self.held = options, Held(quantizer, params, ("scale",))
        self.codes: Tensor
        self.register_buffer("codes", quantizer.quantize(x, quantizer.harden(self.held.params())).unpacked())
        self.rows = nn.Parameter(torch.ones(x.shape[0], *(1,) * (x.dim() - 1), dtype=torch.float32, device=x.device))
        self.columns = None
        if options.columns:
            self.columns = nn.Parameter(torch.ones(1, *x.shape[1:], dtype=torch.float32, device=x.device))
        start = self.held.params().scale
        nested = any(isinstance(how, Quantizer) for how in (quantizer.scale_format, quantizer.offset_format))
        start = start.detach().clone() if nested and isinstance(start, Tensor) else None
        self.start: Tensor | None
        self.register_buffer("start", start, persistent=False)

    @property
    def merges(self) -> bool:
        """Whether the rows' factors go into the scales: each block of them, and of the offsets, is in one row."""
        params = self.held.params()
        kept = [value for value in (params.scale, params.offset) if value is not None]
        fits = (isinstance(v, Tensor) and (v.dim(), v.shape[0]) == (self.rows.dim(), len(self.rows)) for v in kept)
        return self.options.merge and params.scale is not None and all(fits)

    def params(self) -> QuantParams:
        """Raw, as far as they were learned."""
        params = self.held.params()
        scale, offset = params.scale, params.offset
        if self.merges:
            assert isinstance(scale, Tensor)
            scale, offset = scale * self.rows, offset * self.rows if isinstance(offset, Tensor) else None
        # Whether they have moved is not asked in training: that would wait for the device at every step.
        start = self.start
        if start is not None and isinstance(scale, Tensor) and (self.training or not torch.equal(scale, start)):
            return replace(params, scale=scale, offset=offset, scale_params=None, offset_params=None)
        return replace(params, scale=scale, offset=offset)

    def _factors(self) -> list[nn.Parameter]:
        """Those that are stored beside the scales."""
        rows = [] if self.merges else [self.rows]
        return rows if self.columns is None else [*rows, self.columns]

    def _decoded(self, _: Tensor, grid: Grid) -> Tensor:
        return grid.decode(self.quantizer.granularity.to_blocks(self.codes))

    def estimate(self, x: Tensor) -> Tensor:  # noqa: D102
        values = self.quantizer.soft(x.detach().float(), self.params(), self._decoded)
        for factor in self._factors():
            values = values * straight_through(dense(self.options.stored(factor.detach())), factor)
        return values.to(x.dtype)

    @torch.no_grad()
    def settle(self, x: Tensor) -> QTensor:  # noqa: D102
        base = self.quantizer.pack(self.codes, self.params())
        factors = tuple(self.options.stored(factor.detach()) for factor in self._factors())
        return OuterScaled(base, factors) if factors else base

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """``scales`` of blocks (where there are none of their own, the rows' factors), and ``factors``."""
        rows, columns = [self.rows], [] if self.columns is None else [self.columns]
        scale = self.held._parameters.get("scale")
        return {"scales": rows if scale is None else [scale], "factors": columns if scale is None else rows + columns}


@dataclass(frozen=True, kw_only=True)
class BinarizationScales(Part):
    """Options of the method.

    Attributes:
        columns: whether columns have factors.
        merge: whether the rows' factors become part of the scales where they can.
        factors: what is stored of factors: ``float16``, ``bfloat16``, ``float32``, or a quantizer line (``uint8 tensor
            scale=minmax(offset=true)``).
    """

    columns: bool = True
    merge: bool = True
    factors: str = "float16"

    sides = (WEIGHTS,)
    groups = ("scales", "factors")
    fixes_x = True
    keeps_codes = True

    def __post_init__(self) -> None:
        if self.factors not in PLAIN:
            Quantizer(self.factors)

    def stored(self, factor: Tensor) -> Tensor | QTensor:
        """As a file has it."""
        if self.factors in PLAIN:
            return narrow_scale(factor, self.factors).to(getattr(torch, self.factors))
        return Quantizer(self.factors).quantize(factor)

    def begin(self, quantizer: Quantizer, x: Tensor, start: QuantParams | None, side: str) -> Learned:  # noqa: D102
        return AroundCodes(quantizer, x, quantizer.measured(x, start), self)


PART = BinarizationScales
