"""Block-AP: weights, scales and zero points all learn, through the quantizer's own rounding (EfficientQAT, phase 1).

    w_hat = s (clamp(round(w / s) + z) - z)
    in range:  dw_hat/dw = 1,  dw_hat/ds = round(w / s) - w / s,  dw_hat/dz = 0
    clipped:   dw_hat/dw = 0,  dw_hat/ds = (lowest or highest code) - z,  dw_hat/dz = -s

Chen et al. 2024, "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models", arXiv:2407.11062,
section 3.2. z learns as a real number and is rounded straight through; only scales, whole zero points and codes are
stored. Begins at round-to-nearest. The weights are this part's own: the layer's float weight stays what it was, which
reports compare with.

Where we differ: any format (round() is to its grid; without a zero point there is none to learn, a real offset learns
in its place), and the zero point stays a code as the range always holds zero. Scales have no floor of 1e-4: they are
kept positive by a rate that is small beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nybble.learned import WEIGHTS, Learned, Part
from nybble.learned._held import Held, check_own_scales
from nybble.ops.grid import Grid, straight_through
from nybble.ops.reaching import reach
from nybble.qtensor import QTensor, QuantParams
from nybble.quantizer import Quantizer


class AllTrained(Learned):
    """See the module.

    Args:
        quantizer: with a scale that is a tensor.
        x: the weight, copied.
        params: to begin with.
    """

    nearest = False

    def __init__(self, quantizer: Quantizer, x: Tensor, params: QuantParams) -> None:
        super().__init__(quantizer, WEIGHTS)
        self.held = Held(quantizer, params, ("scale", "zero_point", "offset"))
        self.weight = nn.Parameter(x.detach().float().clone())

    def estimate(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.quantizer.soft(self.weight, self.held.params(), _clamped).to(x.dtype)

    def settle(self, x: Tensor) -> QTensor:  # noqa: D102
        return self.quantizer.settle(self.weight, self.held.params())

    def groups(self) -> dict[str, list[nn.Parameter]]:  # noqa: D102
        return {"weights": [self.weight], "scales": list(self.held.parameters())}


def _clamped(y: Tensor, grid: Grid) -> Tensor:
    """Rounded, then clamped: the gradient of y up to half a step beyond the range, of the zero point from there on."""
    low, high = reach(y, grid)
    inside = (y.detach() >= low) & (y.detach() <= high)
    return straight_through(grid.nearest(y), torch.where(inside, y, grid.clamp(y)))


@dataclass(frozen=True, kw_only=True)
class BlockAP(Part):
    """No options: learning rates are for the groups ``weights`` and ``scales`` (zero points among these)."""

    sides = (WEIGHTS,)
    groups = ("weights", "scales")
    fixes_x = True

    def check_more(self, quantizer: Quantizer, side: str) -> None:  # noqa: D102
        check_own_scales("block-ap", quantizer, "ste")

    def begin(self, quantizer: Quantizer, x: Tensor, start: QuantParams | None, side: str) -> Learned:  # noqa: D102
        return AllTrained(quantizer, x, quantizer.measured(x, start))


PART = BlockAP
