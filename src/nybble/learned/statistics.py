"""Weights of very few bits, rounded by statistics of the weight at every step; the gradient is an identity.

    w_hat = s * round(clip((w - m) / s))          dL/dw = dL/dw_hat (with ``mask`` where |w - m| < mask s, else 0)

s is what the quantizer's scale rule measures, m a mean that is taken off before rounding and not put back; no gradient
goes through either. What is stored are the codes of w - m and s: a tensor of the quantizer like any other.

=======================================  ==========================================================================
ternary, binary: ``center: block,        TBT as its text has it: s = 4/3 and 1 times mean|w - m|, of each row
mask: 1``                                (``ternary channel scale=max-entropy``, ``binary channel scale=mean``)
the same without options                 TBT as its published code has it
binary: ``center: tensor, raw: true``    BiT: s = mean|w|, the sign that of w - mean(w) over the whole tensor
                                         (``binary scale=mean``; rows of embeddings ``binary channel scale=mean``)
``midriseK`` without options             OFQ's StatsQ, ``midrise3 channel scale=max-entropy``: levels s (k + 1/2), s the
                                         step, 2 mean|w| / 2**(K - 1) of a row; gradients pass beyond the ends, too
the same with ``normalised: true``       N2UQ's entropy-preserving weights, trained as its published code does: the
                                         gradient over c = s times the largest level, as if it trained w / c. Of
                                         1 bit ``binary channel scale=mean``
2 bits: ``mask: 1.98``                   LLM-QAT's StatsQ grid, ``midrise2 channel scale=max-entropy``, clipped at
                                         0.99 * 2 mean|w| of a row
ternary: ``threshold: 0.7``              TWN: 0 up to 0.7 mean|w|, s the mean magnitude of all others
                                         (``ternary scale=mean(above=0.7)``)
=======================================  ==========================================================================

Liu et al. 2023, "Binary and Ternary Natural Language Generation", arXiv:2306.01841; Liu et al. 2022, "BiT: Robustly
Binarized Multi-distilled Transformer", arXiv:2205.13016; Liu et al. 2023, "LLM-QAT", arXiv:2305.17888; Liu et al. 2023,
"Oscillation-free Quantization for Low-bit Vision Transformers" (OFQ), arXiv:2302.02210; Liu et al. 2022,
"Nonuniform-to-Uniform Quantization" (N2UQ), arXiv:2111.14826; Li et al. 2016, "Ternary Weight Networks",
arXiv:1605.04711, eq. 3-6.

Where we differ: the sign of 0 is +1, where their code has a third value; a block without a magnitude (zeros, or all of
it the mean) becomes zeros by a scale of 0, where theirs divides by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.learned import WEIGHTS, Learned, Part
from nybble.learned._held import check_own_scales
from nybble.ops.grid import Round, straight_through
from nybble.qtensor import QuantParams, block_view
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.scales.mean import mean_of


class ByStatistics(Learned):
    """See the module.

    Args:
        quantizer: any that is deterministic. options: of the part.
    """

    def __init__(self, quantizer: Quantizer, options: Statistics) -> None:
        super().__init__(quantizer, WEIGHTS)
        self.options, self.nearest = options, not options.threshold

    @torch.no_grad()
    def measured(self, x: Tensor) -> tuple[Tensor, QuantParams]:
        """What is rounded, float32 of the shape of x, and the parameters to round it with."""
        wide = x.detach().float()
        if self.options.center == "none" or not wide.numel():
            return wide, self.quantizer.measured(wide, None)
        centered = wide - self._mean(wide)
        return centered, self.quantizer.measured(wide if self.options.raw else centered, None)

    def _mean(self, wide: Tensor) -> Tensor:
        """float32 that broadcasts against the weight; sums of float32 would depend on their order."""
        if self.options.center == "tensor":
            return wide.double().mean().float()
        cut = self.quantizer.granularity
        mask = cut.mask(wide.shape, wide.device)
        mean = mean_of(cut.to_blocks(wide).double(), None if mask is None else mask.double()).float()
        return cut.expand(mean.reshape(cut.scale_shape(wide.shape)), wide.shape)

    def estimate(self, x: Tensor) -> Tensor:  # noqa: D102
        centered, params = self.measured(x)
        found = self.quantizer.soft(centered, params, self._decided(centered)).to(x.dtype)
        through = torch.where(self._inside(centered, params), x, x.detach()) if self.options.mask else x
        if self.options.normalised:
            through = through / self._largest(centered, params)
        return straight_through(found, through)

    def _largest(self, centered: Tensor, params: QuantParams) -> Tensor:
        """The largest value of each block as it is rounded, 1 where all are 0; of the shape of the weight."""
        cut, shape = self.quantizer.granularity, tuple(centered.shape)
        assert params.scale is not None
        largest = block_view(params.scale, cut, shape) * self.quantizer.format.absmax
        return cut.from_blocks(torch.where(largest == 0, 1.0, largest).expand_as(cut.to_blocks(centered)), shape)

    def _inside(self, centered: Tensor, params: QuantParams) -> Tensor:
        cut, shape = self.quantizer.granularity, tuple(centered.shape)
        assert params.scale is not None
        scale = block_view(params.scale, cut, shape)  # 0: a block without a magnitude, which is to leave that
        inside = (cut.to_blocks(centered).abs() < self.options.mask * scale) | (scale == 0)
        return cut.from_blocks(inside, shape)

    def _decided(self, centered: Tensor) -> Round | None:
        """Levels by a threshold of their own; None for the nearest ones."""
        if not self.options.threshold:
            return None
        cut, shape = self.quantizer.granularity, centered.shape
        mask = cut.mask(shape, centered.device)
        blocks = cut.to_blocks(centered).double()
        limit = self.options.threshold * mean_of(blocks.abs(), None if mask is None else mask.double())
        values = torch.where(blocks.abs() <= limit, 0.0, blocks.sign()).float()
        return lambda y, grid: values

    def removed(self, x: Tensor) -> Tensor | None:  # noqa: D102
        if self.options.center == "none" or not x.numel():
            return None
        return self._mean(x.detach().float()).expand(x.shape)

    def settle(self, x: Tensor) -> BlockQTensor:  # noqa: D102
        centered, params = self.measured(x)
        return self.quantizer.settle(centered, params, self._decided(centered))


@dataclass(frozen=True, kw_only=True)
class Statistics(Part):
    """Options of the method.

    Attributes:
        center: which mean is taken off before rounding: none, that of each ``block`` that shares a scale, or that
            of the whole ``tensor``.
        raw: measure the scale on the weight as it is, not on what is left of it.
        mask: no gradient where ``|w - m| >= mask * s``; 0 for none.
        normalised: the gradient is divided by the largest value that a block is rounded to.
        threshold: of three levels the one in the middle up to so many times mean|w - m|; 0 takes the nearest level.
    """

    center: Literal["none", "block", "tensor"] = "none"
    raw: bool = False
    mask: float = 0.0
    threshold: float = 0.0
    normalised: bool = False

    sides = (WEIGHTS,)
    takes_start = False

    def __post_init__(self) -> None:
        if self.center not in ("none", "block", "tensor"):
            raise SchemeError(f"statistics: center={self.center}; it is none, block or tensor.")
        if not self.mask >= 0:
            raise SchemeError(f"statistics: mask={self.mask:g} is in units of the scale; give one above 0, or 0.")
        if not self.threshold >= 0:
            raise SchemeError(
                f"statistics: threshold={self.threshold:g} is in units of mean|w|; give one above 0, or 0."
            )
        if self.raw and self.center == "none":
            raise SchemeError("statistics: raw=true without a center changes nothing; leave it out, or add center.")

    def check_more(self, quantizer: Quantizer, side: str) -> None:  # noqa: D102
        check_own_scales("statistics", quantizer, "ste")
        if self.threshold and quantizer.format.grid.tolist() != [-1, 0, 1]:
            raise SchemeError(
                f"statistics: threshold={self.threshold:g} parts the levels -1, 0 and 1, and {quantizer} has others; "
                "use ternary, or leave threshold out."
            )
        if self.center != "none" and (quantizer.scale.has_offset or quantizer.scale.needs_integer or quantizer.center):
            raise SchemeError(
                f"statistics: center={self.center} takes a mean off that isn't put back, and {quantizer} keeps one of "
                "its own; leave one of them out."
            )

    def begin(self, quantizer: Quantizer, x: Tensor, start: QuantParams | None, side: str) -> Learned:  # noqa: D102
        return ByStatistics(quantizer, self)


PART = Statistics
