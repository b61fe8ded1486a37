"""Pruning ternary quantization: of a layer the smallest weights are 0, of the others the sign is kept, on unit spheres.

    t = sign(w) where |w| > theta, else 0     theta: the smallest value that at least ``share`` of the layer is up to
    u = w / ||w||     v = t / sqrt(nnz)     w_hat = gain v                (of each block, a row say; ||u|| = ||v|| = 1)
    dL/dw = (I - u u^T) / ||w|| (gain dL/dw_hat)  [+ decay w where t is 0]     dL/dgain = v . dL/dw_hat

so the only step that is passed straight through is the one from u to v. What is stored are t and gain / sqrt(nnz).
While it is only pruned (``ternary`` false; :mod:`nybble.training.callbacks.pruning` says when) the training formula is
w itself where it isn't 0, and the gradient an identity; eval mode is what would be stored at every time.

Liu et al. 2021, "Pruning Ternary Quantization", arXiv:2107.10998. The paper's text leaves much open; ours are: the
threshold as a share of the layer; the gain, which begins so that w_hat is the least-squares one (mean |w| of what is
kept) and learns (the paper leaves it to the norm that follows); the decay of pruned weights. It begins at w_hat, which
is no round-to-nearest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.learned import WEIGHTS, Learned, Part
from nybble.learned._held import check_own_scales
from nybble.ops.grid import straight_through
from nybble.qtensor import QuantParams
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer


class PrunedTernary(Learned):
    """See the module.

    Args:
        quantizer: ternary, with a scale a block. options: of the part. x: the weight, whose gains are begun with.

    Attributes:
        share: of the layer's weights that are 0, at least.
        ternary: whether the training formula is ternary yet.
        led: whether a callback says both.
    """

    def __init__(self, quantizer: Quantizer, options: Pruned, x: Tensor) -> None:
        super().__init__(quantizer, WEIGHTS)
        self.share, self.ternary, self.led, self.options = options.share, True, False, options
        self.gain = nn.Parameter(self.least_squares(x))

    @torch.no_grad()
    def least_squares(self, x: Tensor) -> Tensor:
        """float32 [blocks, 1]: the gains that come nearest to ``x``: its part along v."""
        blocks = self._blocks(x)
        return (blocks * self.directions(x)[0]).sum(1, keepdim=True)

    @torch.no_grad()
    def directions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The unit vectors v and the signs t, float32 [blocks, elements]; 0 of a block of which nothing is kept."""
        wide = x.detach().float()
        least = math.ceil(self.share * wide.numel())
        theta = wide.abs().reshape(-1).kthvalue(least).values if least else wide.new_full((), -1.0)
        blocks = self._blocks(wide)
        kept = torch.where(blocks.abs() > theta, blocks.sign(), 0.0)
        return kept / kept.abs().sum(1, keepdim=True).clamp_min(1).sqrt(), kept

    def _blocks(self, x: Tensor) -> Tensor:
        found: Tensor = self.quantizer.granularity.to_blocks(x.float())
        return found

    def estimate(self, x: Tensor) -> Tensor:  # noqa: D102
        v, t = self.directions(x)
        blocks = self._blocks(x)
        if self.options.decay and torch.is_grad_enabled() and x.requires_grad:
            blocks = _Decayed.apply(blocks, t == 0, self.options.decay)  # type: ignore[no-untyped-call]
        if self.ternary:
            norm = blocks.norm(dim=1, keepdim=True)
            found = self.gain * straight_through(v, blocks / torch.where(norm == 0, 1.0, norm))
        else:
            found = straight_through(blocks.detach() * t.abs(), blocks)
        return self.quantizer.granularity.from_blocks(found, tuple(x.shape)).to(x.dtype)

    def settle(self, x: Tensor) -> BlockQTensor:  # noqa: D102
        t, cut = self.directions(x)[1], self.quantizer.granularity
        gain = self.gain.detach() if self.ternary else self.least_squares(x)
        scale = (gain / t.abs().sum(1, keepdim=True).clamp_min(1).sqrt()).reshape(cut.scale_shape(tuple(x.shape)))
        return self.quantizer.settle(x, QuantParams(scale), lambda y, grid: t)

    @torch.no_grad()
    def cosine(self, x: Tensor) -> Tensor:
        """float32 [blocks]: of w and t; 0 where either is 0."""
        return torch.nn.functional.cosine_similarity(self._blocks(x.detach()), self.directions(x)[1], dim=1)

    def groups(self) -> dict[str, list[nn.Parameter]]:  # noqa: D102
        return {"gains": [self.gain]}

    def get_extra_state(self) -> Tensor:
        """Share and phase, for the state dict."""
        return torch.tensor([self.share, self.ternary, self.led], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Inverse of :meth:`get_extra_state`."""
        self.share, self.ternary, self.led = float(state[0]), bool(state[1]), bool(state[2])


class _Decayed(torch.autograd.Function):
    """The identity; where ``where`` is, ``decay`` x itself comes to the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, where: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(x, where)
        ctx.decay = decay
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, where = ctx.saved_tensors
        return gradient + torch.where(where, ctx.decay * x, 0.0), None, None


@dataclass(frozen=True, kw_only=True)
class Pruned(Part):
    """Options of the method.

    Attributes:
        share: of a layer's weights that are 0, at least; 0 or more, below 1. The pruning callback moves it.
        decay: of weights that are 0, over the loss.
    """

    share: float = 0.5
    decay: float = 1e-4

    sides = (WEIGHTS,)
    groups = ("gains",)
    takes_start = False
    soft = True

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise SchemeError(f"pruned: share={self.share:g} of the weights are 0; give 0 or more, below 1.")
        if not 0 <= self.decay < math.inf:
            raise SchemeError(f"pruned: decay={self.decay:g}; give a number of 0 or more.")

    def check_more(self, quantizer: Quantizer, side: str) -> None:  # noqa: D102
        check_own_scales("pruned", quantizer)
        if quantizer.format.grid.tolist() != [-1, 0, 1]:
            raise SchemeError(
                f"pruned keeps the signs of some weights and makes the others 0; {quantizer} ({quantizer.format.name}) "
                "has other levels. Use ternary channel."
            )
        if quantizer.scale.has_offset or quantizer.scale.needs_integer or quantizer.center:
            raise SchemeError(f"pruned has signs and a scale, and {quantizer} an offset; use ternary channel.")

    def begin(self, quantizer: Quantizer, x: Tensor, start: QuantParams | None, side: str) -> Learned:
        """After all checks.

        Raises:
            SchemeError: nothing would be left of the tensor, or its numbers have no order.
        """
        if not bool(x.isfinite().all()):
            raise SchemeError("pruned: a weight that isn't finite has no place in an order of magnitudes.")
        found = PrunedTernary(quantizer, self, x)
        check_left(found, x, "pruned")
        return found


def check_left(learned: PrunedTernary, x: Tensor, what: str) -> None:
    """Raise SchemeError where all weights of a layer would be 0."""
    if not bool(learned.directions(x)[1].any()):
        raise SchemeError(
            f"{what}: share={learned.share:g} leaves none of a layer's {x.numel()} weights:"
            f" {math.ceil(learned.share * x.numel())} are to be 0, and no other is larger than these; lower the share, "
            "or leave the layer out (ignore)."
        )


PART = Pruned
