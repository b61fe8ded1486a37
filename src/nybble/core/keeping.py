"""Which state of a training is kept: the last, or the best that was seen on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


class Best:
    """The best state so far.

    Args:
        parameters: what makes up a state.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self.judged, self.step = math.inf, -1
        self._state: list[Tensor] = []

    def see(self, judged: float, step: int) -> None:
        """Keep the parameters as they are now if they are judged better than all before; ``step``: steps taken."""
        if judged < self.judged:
            self.judged, self.step = judged, step
            self._state = [parameter.detach().clone() for parameter in self._parameters]

    def restore(self) -> None:
        """Bring the best state back, if any was seen."""
        for parameter, kept in zip(self._parameters, self._state, strict=False):
            parameter.data.copy_(kept)
