"""LSQ: the scale is a parameter, trained with the weights.

    x_hat = s * clamp(round(x / s), -Q_N, Q_P)

    dx_hat/ds = round(x / s) - x / s  inside,  -Q_N or Q_P outside          dx_hat/dx = 1 inside, 0 outside
    dL/ds is multiplied by g = 1 / sqrt(N Q_P)

Esser et al. 2020, "Learned Step Size Quantization", arXiv:1902.08153, eq. 1-3 and section 2.2. N is the number of
weights that share the scale, or the number of features of an activation: its last dimension, of images all but the
first one. The paper's first scale, 2 mean|x| / sqrt(Q_P), is the quantizer's ``scale=learned``; any other rule may
begin.

Where we differ: at the very ends of the range an element counts as inside. On a float format round() is to its grid and
Q_P its largest value. A scale that is stored in 16 bits, or quantized (NVFP4, MX), is used as stored, with the gradient
straight through; the outer scale of nested ones, and a zero point or offset, stay as they begin. As in the paper,
nothing keeps a scale above zero but a learning rate that is small beside it. The paper rounds what follows a ReLU to
unsigned integers; ``unsigned`` does so with whatever is never negative where it begins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nybble.core.errors import NybbleError, SchemeError
from nybble.learned import ACTIVATIONS, WEIGHTS, Learned, Part
from nybble.learned._held import Held
from nybble.qtensor import QTensor, QuantParams
from nybble.quantizer import Quantizer
from nybble.scales.one import One


class LearnedScale(Learned):
    """See the module.

    Args:
        quantizer: with a scale that is a tensor. side: weights or activations.
        params: to begin with.
        count: N, elements that share a scale.
    """

    def __init__(self, quantizer: Quantizer, side: str, params: QuantParams, count: int) -> None:
        super().__init__(quantizer, side)
        self.held = Held(quantizer, params, ("scale",))
        self.factor = 1 / math.sqrt(count * quantizer.format.max)

    @property
    def scale(self) -> nn.Parameter:
        """Raw: float32, the granularity's scale shape."""
        return self.held.get_parameter("scale")

    def estimate(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.estimate_in(x, x.dtype)

    def estimate_in(self, x: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: D102
        return self.quantizer.soft(x, self.held.params(), dtype=dtype, share=self.factor)

    def settle(self, x: Tensor) -> QTensor | QuantParams:  # noqa: D102
        params = self.quantizer.harden(self.held.params())
        return params if self.side == ACTIVATIONS else self.quantizer.quantize(x, params)

    def fixed(self) -> QuantParams | None:  # noqa: D102
        return self.quantizer.harden(self.held.params()) if self.side == ACTIVATIONS else None

    def groups(self) -> dict[str, list[nn.Parameter]]:  # noqa: D102
        return {"scales": [self.scale]}


@dataclass(frozen=True, kw_only=True)
class Lsq(Part):
    """Options of the method; the scale rule of the quantizer says where the scale begins.

    Attributes:
        unsigned: activations of a format with a sign (``int4``, ``dybit4``), whose first example has nothing below 0,
            take the one without (``uint4``, ``udybit4``).
    """

    unsigned: bool = False
    groups = ("scales",)

    def check_more(self, quantizer: Quantizer, side: str) -> None:  # noqa: D102
        if side == ACTIVATIONS and not quantizer.static:
            raise SchemeError(
                f"lsq learns one scale for all activations, and {quantizer} measures each tensor's: write 'tensor "
                "static', or learn it by ste."
            )
        if side == ACTIVATIONS and quantizer.scale.takes_divisor:
            raise SchemeError(
                f"lsq learns one scale for all activations, and {quantizer} measures those of blocks under a divisor: "
                "write 'tensor static', or learn it by ste."
            )
        if quantizer.granularity.factored:
            raise SchemeError(
                f"lsq learns a scale for each block; {quantizer} multiplies factors of several blocks. Granularities "
                "that it takes: tensor, channel, group, block, flat. Or learn it by ste."
            )
        if isinstance(quantizer.scale, One):
            raise SchemeError(f"lsq learns a scale, and {quantizer} has none; leave out scale=one, or take ste.")
        if self.unsigned and side == WEIGHTS:
            raise SchemeError("lsq: unsigned is for activations, and weights are signed; leave it out.")
        if self.unsigned:
            _without_sign(quantizer)

    def begin(self, quantizer: Quantizer, x: Tensor, start: QuantParams | None, side: str) -> Learned:  # noqa: D102
        if self.unsigned and start is None and not bool((x < 0).any()):
            quantizer = _without_sign(quantizer)
        params = quantizer.measured(x, start)
        if side == WEIGHTS:
            count = x.numel() // max(1, math.prod(quantizer.granularity.scale_shape(x.shape)))
        else:
            count = math.prod(x.shape[1:]) if x.dim() > 3 else x.shape[-1]
        return LearnedScale(quantizer, side, params, max(1, count))


def _without_sign(quantizer: Quantizer) -> Quantizer:
    """The same with the format that has no sign, of the same name and bits; itself where it has none already."""
    name = quantizer.format.name
    if not quantizer.format.signed:
        return quantizer
    if quantizer.scale.needs_integer or quantizer.scale.has_offset:
        raise SchemeError(f"lsq: unsigned=true and {quantizer}, whose offset does the same; leave one of them out.")
    try:
        return Quantizer(str(quantizer).replace(name, f"u{name}", 1))
    except NybbleError as error:
        raise SchemeError(
            f"lsq: unsigned=true asks for {name} without a sign, and there is no u{name} (as {quantizer}); use an "
            "integer or DyBit format, or leave it out."
        ) from error


PART = Lsq
