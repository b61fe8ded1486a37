"""FlexRound: each weight is divided by a factor of its own before it is rounded, so it may go several steps away.

    w_hat = s1 clamp(round(w / S)),     S = s1 S2 s3 (s4)
    S2 for every weight, s3 for every row, s4 for every column; all begin at 1, which is round-to-nearest
    dw_hat/dS' = -w / S'^2 in range, 0 outside, where S' = S2 s3 (s4): large weights are freer to leave their value

Lee et al. 2023, "FlexRound: Learnable Rounding based on Element-wise Division for Post-Training Quantization",
arXiv:2306.00317. As in the published code the factors are exponentials of what is learned, so that they stay positive:
no weight changes its sign, and zeros stay zero. s1 learns too (dw_hat/ds1 = round(w / S) - w / S in range); only it
is stored.

Where we differ: any format and granularity, round() being to the format's own grid and s1 the scale of each block.
Zero points, offsets, outer scales and the factors of a factored scale stay as they begin. ``columns`` (s4) is a factor
for each column of the matrix: of a convolution, whose paper's s4 is for each input channel, for each of its places too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.learned import WEIGHTS, Learned, Part
from nybble.learned._held import Held
from nybble.ops.grid import Grid
from nybble.ops.reaching import reaching
from nybble.qtensor import QTensor, QuantParams
from nybble.quantizer import Quantizer


class Divided(Learned):
    """See the module.

    Args:
        quantizer: the specification.
        x: the weight, for its shape.
        params: to begin with.
        columns: whether there is an s4.
    """

    nearest = False

    def __init__(self, quantizer: Quantizer, x: Tensor, params: QuantParams, columns: bool) -> None:
        super().__init__(quantizer, WEIGHTS)
        self.held = Held(quantizer, params)
        shapes = [tuple(x.shape), (x.shape[0], *(1,) * (x.dim() - 1))]
        if columns:
            shapes.append((1, *x.shape[1:]))
        self.logs = nn.ParameterList(torch.zeros(s, dtype=torch.float32, device=x.device) for s in shapes)
        scale = self.held.params().scale
        self.log_scale = nn.Parameter(torch.zeros_like(scale)) if isinstance(scale, Tensor) else None

    def params(self) -> QuantParams:
        """Raw, with the scale as far as it was learned."""
        params = self.held.params()
        if self.log_scale is None:
            return params
        assert isinstance(params.scale, Tensor)
        return replace(params, scale=params.scale * self.log_scale.exp())

    def _round(self, y: Tensor, grid: Grid) -> Tensor:
        logs = list(self.logs)
        return reaching(y / self.quantizer.granularity.to_blocks(sum(logs[1:], logs[0])).exp(), grid)

    def estimate(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.quantizer.soft(x, self.params(), self._round)

    def settle(self, x: Tensor) -> QTensor:  # noqa: D102
        return self.quantizer.settle(x, self.params(), self._round)

    def groups(self) -> dict[str, list[nn.Parameter]]:  # noqa: D102
        return {"rounding": list(self.parameters())}


@dataclass(frozen=True, kw_only=True)
class FlexRound(Part):
    """``columns``: learn s4 too, as the paper does for convolutions."""

    columns: bool = False

    sides = (WEIGHTS,)
    groups = ("rounding",)

    def check_more(self, quantizer: Quantizer, side: str) -> None:  # noqa: D102
        if quantizer.floor:
            raise SchemeError(
                f"flexround moves weights towards zero too, and {quantizer} stores nothing below its floor; leave "
                "floor out."
            )

    def begin(self, quantizer: Quantizer, x: Tensor, start: QuantParams | None, side: str) -> Learned:  # noqa: D102
        return Divided(quantizer, x, quantizer.measured(x, start), self.columns)


PART = FlexRound
