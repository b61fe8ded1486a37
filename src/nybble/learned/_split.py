"""A weight whose columns are in different quantizers: each part learns by itself, or stays as a solver left it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nybble.learned import WEIGHTS, Learned
from nybble.qtensor import QTensor, QuantParams
from nybble.qtensor.split import SplitQTensor
from nybble.quantizer import Quantizer


class SplitLearned(Learned):
    """What rounds every part, side by side; which slice is in which part stays.

    Args:
        packed: as a solver left it.
        parts: for each part of it what learns, made for its slices of the weight; None keeps that part.
        quantizer: what to call it by.
    """

    def __init__(self, packed: SplitQTensor, parts: Sequence[Learned | None], quantizer: Quantizer) -> None:
        super().__init__(quantizer, WEIGHTS)
        self._packed = packed
        self.parts = nn.ModuleDict({str(i): part for i, part in enumerate(parts) if part is not None})

    def _slices(self, x: Tensor) -> list[Tensor]:
        """Of the weight, each part's."""
        return [x.index_select(self._packed.dim, at.to(x.device)) for at in self._packed.slices()]

    def estimate(self, x: Tensor) -> Tensor:
        made = []
        for number, (part, own) in enumerate(zip(self._packed.parts, self._slices(x), strict=True)):
            if str(number) in self.parts:
                made.append(self.parts[str(number)](own))
            else:
                made.append(part.dequantize(x.dtype) if isinstance(part, QTensor) else part.to(x.dtype))
        back = self._packed.order().argsort().to(x.device)
        return torch.cat(made, self._packed.dim).index_select(self._packed.dim, back)

    def settle(self, x: Tensor) -> QTensor | QuantParams:
        made: list[QTensor | Tensor] = list(self._packed.parts)
        for number, own in enumerate(self._slices(x)):
            if str(number) in self.parts:
                settled = self._part(number).settle(own)
                assert isinstance(settled, QTensor)
                made[number] = settled
        return SplitQTensor(self._packed.shape, self._packed.dim, self._packed.index, tuple(made))

    def penalty(self, t: float | Tensor) -> Tensor:
        return sum((part.penalty(t) for part in self._learned()), super().penalty(t))

    def groups(self) -> dict[str, list[nn.Parameter]]:
        found: dict[str, list[nn.Parameter]] = {}
        for part in self._learned():
            for name, parameters in part.groups().items():
                found.setdefault(name, []).extend(parameters)
        return found

    def _part(self, number: int) -> Learned:
        found = self.parts[str(number)]
        assert isinstance(found, Learned)
        return found

    def _learned(self) -> list[Learned]:
        return [part for part in self.parts.values() if isinstance(part, Learned)]
