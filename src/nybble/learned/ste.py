"""Straight-through: the quantizer as it is, with the gradient of a clipped identity.

    x_hat = Q(x)          dL/dx = dL/dx_hat inside the range, 0 outside

Bengio et al. 2013, arXiv:1308.3432. Inside is what rounds to a value of the range before it saturates, half a step
beyond the ends too, as ``torch.fake_quantize_*`` counts: the largest element of a block that decides the scale may lie
there by the rounding of x / scale, or of a zero point.

Nothing of its own is learned: scales follow the weight (or are measured on every activation), and no gradient goes
through them, but with ``through``. With static activations, or a ``start``, the parameters given are kept.

With absmax scales nothing is clipped, and the gradient is the identity: MinMax of LLM-QAT (Liu et al. 2023,
arXiv:2305.17888), ``int4 channel`` and ``int8 token``. Its published code has the gradient stop at 2 all the same,
whatever the scale: ``mask: 2``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from nybble.core.errors import SchemeError
from nybble.kv_format import rows_apart
from nybble.learned import ACTIVATIONS, Learned, Part
from nybble.learned._held import Held
from nybble.learned._share import has_range, shared_range
from nybble.ops.reaching import reaching
from nybble.qtensor import QTensor, QuantParams
from nybble.quantizer import Quantizer


class StraightThrough(Learned):
    """See the module.

    Args:
        quantizer: any that is deterministic. side: weights or activations.
        params: kept as they are; None measures them on every tensor.
        through, mask: see :class:`Ste`.
    """

    def __init__(
        self, quantizer: Quantizer, side: str, params: QuantParams | None, through: bool = False, mask: float = 0.0
    ) -> None:
        super().__init__(quantizer, side)
        self.through, self.mask = through, mask
        self.held = None if params is None else Held(quantizer, params)

    def estimate(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.estimate_in(x, x.dtype)

    def estimate_in(self, x: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: D102
        if self.mask:
            x = torch.where(x.detach().abs() < self.mask, x, x.detach())
        if self.held is None and self.through:
            return self.quantizer.soft(x, following(self.quantizer, x), reaching, dtype=dtype)
        params = None if self.held is None else self.held.params()
        return self.quantizer.soft(x, params, reaching, dtype=dtype)

    def lookup(self, x: Tensor, ids: Tensor, padding: int | None = None) -> Tensor:  # noqa: D102
        if self.held is not None or ids.numel() >= x.shape[0] or not rows_apart(self.quantizer):
            return super().lookup(x, ids, padding)
        found: Tensor = self(functional.embedding(ids.reshape(-1), x, padding))
        return found.reshape(*ids.shape, x.shape[1])

    def settle(self, x: Tensor) -> QTensor | QuantParams:  # noqa: D102
        params = self.fixed()
        if self.side == ACTIVATIONS:
            return self.quantizer.measured(x.detach(), None) if params is None else params
        return self.quantizer.quantize(x, params)

    def fixed(self) -> QuantParams | None:  # noqa: D102
        return None if self.held is None else self.quantizer.harden(self.held.params())


def following(quantizer: Quantizer, x: Tensor) -> QuantParams | None:
    """Raw parameters measured on ``x``, with the gradient of its blocks' ranges; None where there is none to give.

    Of absmax and minmax it is the rule's own; any other rule's scale is taken to grow with a block's largest magnitude.
    """
    shape = quantizer.granularity.scale_shape(x.shape)
    if has_range(quantizer):
        whole = torch.ones(shape, dtype=torch.float32, device=x.device)
        return shared_range(quantizer, x, whole, whole)
    raw = quantizer.soften(quantizer.measured(x.detach(), None))
    if quantizer.granularity.factored or not isinstance(raw.scale, Tensor) or not x.requires_grad:
        return None
    largest = quantizer.granularity.to_blocks(x).float().abs().amax(1).reshape(shape)
    whole = torch.where(largest > 0, largest, 1.0)  # what is all 0 would give 0 / 0 to the gradient, chosen or not
    grown = whole / whole.detach()
    return replace(raw, scale=raw.scale * grown)


@dataclass(frozen=True, kw_only=True)
class Ste(Part):
    """Options of the method.

    Attributes:
        through: the gradient goes through measured scales too, by what decides them, the extremes of each block: so
            what is in front learns what a range costs all that share it.
        mask: no gradient where ``|x| >= mask``, in the units of x; 0 for none.
    """

    through: bool = False
    mask: float = 0.0

    def __post_init__(self) -> None:
        if not self.mask >= 0:
            raise SchemeError(f"ste: mask={self.mask:g} is a magnitude where gradients end; give one above 0, or 0.")

    def begin(self, quantizer: Quantizer, x: Tensor, start: QuantParams | None, side: str) -> Learned:  # noqa: D102
        if start is None and quantizer.static:
            start = quantizer.measured(x, None)
        return StraightThrough(quantizer, side, start, self.through, self.mask)


PART = Ste
