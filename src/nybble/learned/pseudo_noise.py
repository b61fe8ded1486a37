"""DiffQ: rounding imitated by noise, so that the bits of every group of weights are learned with the weights.

    w_noisy = w + D_s n,   D_s = (max w - min w) / (2^b_s - 1),   n ~ N(0, 1) / 2   (or uniform in [-1/2, 1/2])
    b_s = b_min + (b_max - b_min) sigmoid(l_s)                                      (``bits: linear``)
    1 / (2^b_s - 1) = n_min^t n_max^(1 - t),  t = sigmoid(l_s)                      (``bits: noise``)
    penalty = lambda MB,  2^20 * 8 MB = sum_s g b_s + 64 + 8 + c S,   c = ceil log2(1 + round(max b) - b_min)

No gradient is passed through a rounding: what is trained is the noisy network. Eval mode rounds every group to
round(b_s) bits (:class:`nybble.qtensor.mixed_bits.MixedBits`), under one range for the whole tensor. The bits begin as
the format's: ``uint8 scale=minmax(offset=true)`` at 8.

Défossez, Adi and Synnaeve 2021, "Differentiable Model Compression via Pseudo Quantization Noise", arXiv:2104.09987. S
is the number of groups; 64 bits are the range, 8 say c. Where we differ: every tensor that the scheme names is rounded,
however small, and the noise comes from torch's own generator, so that a recomputed forward draws the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.learned import WEIGHTS, Learned, Part
from nybble.qtensor import QuantParams
from nybble.qtensor.mixed_bits import MOST, MixedBits, steps
from nybble.quantizer import Quantizer

_MB = 8 * 2.0**20


class NoisyWeight(Learned):
    """See the module.

    Args:
        quantizer: whose bits it begins with.
        options: of the part.
        groups: how many there are.
    """

    def __init__(self, quantizer: Quantizer, options: PseudoNoise, groups: int) -> None:
        super().__init__(quantizer, WEIGHTS)
        self.options = options
        self.logits = nn.Parameter(torch.full((groups,), options.logit(quantizer.format.bits), dtype=torch.float32))

    def bits(self) -> Tensor:
        """float32 [groups], between the ends that the options name, with gradients."""
        t, options = torch.sigmoid(self.logits), self.options
        if options.bits == "linear":
            return options.least + (options.most - options.least) * t
        small, large = options.noises()
        return torch.log2(1 + torch.exp(-(t * math.log(small) + (1 - t) * math.log(large))))

    def widths(self) -> Tensor:
        """int64 [groups]: bits that are stored."""
        return self.bits().detach().round().long().clamp(self.options.least, min(MOST, self.options.most))

    def estimate(self, x: Tensor) -> Tensor:  # noqa: D102
        wide = x.float()
        ends = torch.stack((wide.amin(), wide.amax()))  # aminmax has no derivative before torch 2.12
        step = steps(ends if self.options.range_gradient else ends.detach(), self.bits())
        rows = torch.empty(step.shape[0], wide.numel() // step.shape[0], device=wide.device)
        noise = rows.normal_(0, 0.5) if self.options.noise == "gaussian" else rows.uniform_(-0.5, 0.5)
        return (wide + (step * noise).view_as(wide)).to(x.dtype)

    def settle(self, x: Tensor) -> MixedBits:  # noqa: D102
        return MixedBits.make(x, self.widths(), self.options.least)

    def size(self) -> Tensor:
        """Megabytes (2^20) of the tensor in a file, with gradients to the bits; float64 scalar."""
        bits = self.bits().double()
        said = torch.log2(1 + bits.detach().max().round() - self.options.least).ceil()
        return (self.options.group * bits.sum() + 64 + 8 + said * bits.numel()) / _MB

    def penalty(self, t: float | Tensor) -> Tensor:  # noqa: D102
        return (self.options.penalty * self.size()).float()

    def groups(self) -> dict[str, list[nn.Parameter]]:  # noqa: D102
        return {"bits": [self.logits]}


@dataclass(frozen=True, kw_only=True)
class PseudoNoise(Part):
    """Options of the method.

    Attributes:
        group: elements, in the order of the tensor, that share their bits; 0: all.
        least, most: ends of the bits, which are never reached.
        penalty: of the loss for each megabyte (2^20 bytes) of weights.
        noise: ``gaussian`` of a deviation of half a step, or ``uniform`` over a step.
        bits: what a logit is of: bits, or (``noise``) the logarithm of the step.
        range_gradient: whether gradients reach the largest and the smallest weight through the step.
    """

    group: int = 8
    least: int = 2
    most: int = MOST
    penalty: float = 1.0
    noise: Literal["gaussian", "uniform"] = "gaussian"
    bits: Literal["linear", "noise"] = "linear"
    range_gradient: bool = True

    sides = (WEIGHTS,)
    groups = ("bits",)
    takes_start = False
    soft = True

    def __post_init__(self) -> None:
        if not 1 <= self.least < self.most <= MOST:
            raise SchemeError(
                f"pseudo-noise: bits between {self.least} and {self.most}; least is 1 or more, most up to {MOST}."
            )
        if self.group < 0:
            raise SchemeError(f"pseudo-noise: group={self.group}; it is a number of elements, or 0 for the tensor.")
        if not 0 <= self.penalty < math.inf:
            raise SchemeError(f"pseudo-noise: penalty={self.penalty:g} a megabyte; give a number of 0 or more.")
        for name, known in (("noise", ("gaussian", "uniform")), ("bits", ("linear", "noise"))):
            if getattr(self, name) not in known:
                raise SchemeError(f"pseudo-noise: {name}={getattr(self, name)}; it is {' or '.join(known)}.")

    def noises(self) -> tuple[float, float]:
        """1 / (2^b - 1) at the most and at the least bits."""
        return 1 / (2.0**self.most - 1), 1 / (2.0**self.least - 1)

    def logit(self, bits: int) -> float:
        """That ``bits`` are begun with."""
        if self.bits == "linear":
            t = (bits - self.least) / (self.most - self.least)
        else:
            small, large = (math.log(n) for n in self.noises())
            t = (-math.log(2.0**bits - 1) - large) / (small - large)
        return math.log(t / (1 - t))

    def check_more(self, quantizer: Quantizer, side: str) -> None:  # noqa: D102
        fmt = quantizer.format
        if not fmt.name.startswith("uint") or str(quantizer) != f"{fmt.name} scale=minmax(offset=true)":
            raise SchemeError(
                f"pseudo-noise rounds to integers under one range for the whole tensor, and {quantizer} ({fmt.name}) "
                "says something else; write uint8 scale=minmax(offset=true): 8 are the bits that it begins with."
            )
        if not self.least < fmt.bits < self.most:
            raise SchemeError(
                f"pseudo-noise begins with the {fmt.bits} bits of {fmt.name}, and they move between {self.least} and "
                f"{self.most} without their ends; begin within, or move least or most."
            )

    def begin(self, quantizer: Quantizer, x: Tensor, start: QuantParams | None, side: str) -> Learned:
        """After all checks.

        Raises:
            SchemeError: groups don't fit into the tensor, or its numbers have no range.
        """
        group = self.group or max(1, x.numel())
        if not x.numel() or x.numel() % group:
            raise SchemeError(
                f"pseudo-noise: a tensor {list(x.shape)} can't be parted into groups of {group}; choose a group that "
                f"divides its {x.numel()} elements, or 0 for one width for all."
            )
        if not bool(x.isfinite().all()):
            raise SchemeError("pseudo-noise: a weight that isn't finite has no range to be rounded in.")
        return NoisyWeight(quantizer, replace(self, group=group), x.numel() // group).to(x.device)


PART = PseudoNoise
