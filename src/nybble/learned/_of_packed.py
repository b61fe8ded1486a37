"""A finished weight whose scales learn on: its codes stay, whatever found them and whatever stands around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.core.explicit import no_autocast
from nybble.learned import WEIGHTS, Learned
from nybble.learned._own_lines import own_quantizers
from nybble.learned._split import SplitLearned
from nybble.learned.frozen_codes import Frozen, has_powers
from nybble.qtensor import QTensor, QuantParams, dense
from nybble.qtensor.block import BlockQTensor
from nybble.qtensor.low_rank_sum import LowRankSum
from nybble.qtensor.outer_scaled import OuterScaled
from nybble.qtensor.split import SplitQTensor
from nybble.quantizer import Quantizer
from nybble.scales.one import One


class _Around(Learned):
    """The codes inside a low-rank sum or under outer factors learn; what stands around them stays."""

    def __init__(self, packed: LowRankSum | OuterScaled, inner: Learned) -> None:
        super().__init__(inner.quantizer, WEIGHTS)
        self._packed, self.inner = packed, inner

    def estimate(self, x: Tensor) -> Tensor:
        values: Tensor = self.inner.estimate(x)
        if isinstance(self._packed, LowRankSum):
            a, b = dense(self._packed.a), dense(self._packed.b)
            with no_autocast(a.device):
                return values + a @ b
        for factor in self._packed.factors:
            values = values * dense(factor)
        return values

    def settle(self, x: Tensor) -> QTensor | QuantParams:
        base = self.inner.settle(x)
        assert isinstance(base, QTensor)
        return replace(self._packed, base=base)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return self.inner.groups()


def learn_scales(packed: QTensor, known: Sequence[Quantizer]) -> Learned | None:
    """What learns the scales (and offsets) of a finished weight, its codes frozen; None where it has none to learn.

    As it begins it settles to the very tensors of ``packed``. Of scales that are powers of two logarithms learn.

    Args:
        packed: any kind of QTensor.
        known: quantizers that it, or a part of it, may be of: what says how its scales are stored. Where none of them
            is it, what the weight says of itself has to do.
    """
    if isinstance(packed, BlockQTensor):
        return _of_blocks(packed, known)
    if isinstance(packed, LowRankSum | OuterScaled):
        inner = learn_scales(packed.base, known)
        return None if inner is None else _Around(packed, inner)
    if isinstance(packed, SplitQTensor):
        parts = [learn_scales(part, known) if isinstance(part, QTensor) else None for part in packed.parts]
        first = next((part for part in parts if part is not None), None)
        return None if first is None else SplitLearned(packed, parts, first.quantizer)
    return None


def _of_blocks(packed: BlockQTensor, known: Sequence[Quantizer]) -> Learned | None:
    for quantizer in (*known, *own_quantizers(packed)):
        if (quantizer.format, quantizer.granularity) != (packed.format, packed.granularity):
            continue
        if quantizer.granularity.factored or isinstance(quantizer.scale, One):
            continue
        try:
            if not isinstance(quantizer.soften(packed.params).scale, Tensor):
                continue
            made = Frozen(quantizer, packed.unpacked(), packed.params, octaves=has_powers(quantizer))
            settled = made.settle(torch.empty(0, dtype=torch.float32))
        except SchemeError:  # scales stored in another way than this quantizer's
            continue
        if _same(settled, packed):
            return made
    return None


def _same(one: QTensor, other: QTensor) -> bool:
    mine, yours = one.tensors(), other.tensors()
    return one.spec() == other.spec() and all(torch.equal(mine[name], yours[name]) for name in mine)
