"""What solvers need to know of a layer's inputs: the second moment, and the range for static activations."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.core.errors import DataError
from nybble.core.matmul import gram
from nybble.qtensor import QuantParams
from nybble.quantizer import Quantizer

_SAMPLE = 1 << 20


class SecondMoment:
    """Mean of ``x x^T`` over all tokens, accumulated in float32.

    Args:
        columns: width of the input. inputs: the quantizer that the input passes first, with its parameters if static.
    """

    def __init__(self, columns: int, inputs: Quantizer | None = None, params: QuantParams | None = None) -> None:
        self.columns, self.inputs, self.params = columns, inputs, params
        self.tokens = 0
        self._sum: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Count the tokens of ``x`` [..., columns]."""
        if self.inputs is not None:
            x = self.inputs.fake_quantize(x, self.params)
        flat = x.reshape(-1, self.columns)
        if not len(flat):
            return
        product = gram(flat)
        self._sum = product if self._sum is None else self._sum.add_(product)
        self.tokens += flat.shape[0]

    def mean(self, name: str) -> Tensor | None:
        """float32 [columns, columns], or None if no token came; DataError, naming the layer, if it isn't finite."""
        if self._sum is None:
            return None
        if not bool(torch.isfinite(self._sum).all()):
            raise DataError(
                f"the calibration inputs of {name} hold NaN or Inf (or overflow); check the data and the model's dtype."
            )
        return self._sum.div_(self.tokens)


class Range:
    """Values seen, for one static scale: exact extremes, and an evenly spread sample of about a million others.

    Args:
        total: how many values will come in all.
    """

    def __init__(self, total: int) -> None:
        self.stride = max(1, total // _SAMPLE)
        self._samples: list[Tensor] = []
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Count ``x``."""
        flat = x.reshape(-1).float()
        if not flat.numel():
            return
        low, high = torch.aminmax(flat)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        self._samples.append(flat[:: self.stride].clone())

    def fit(self, quantizer: Quantizer, name: str) -> QuantParams:
        """Parameters of a per-tensor quantizer; absmax and minmax see the extremes, searching rules the sample."""
        if self._low is None or self._high is None:
            raise DataError(
                f"no calibration input reached {name}, so its activations have no scale; use a dynamic quantizer."
            )
        values = torch.cat([*self._samples, self._low[None], self._high[None]])
        if not bool(torch.isfinite(values[-2:]).all()):
            raise DataError(f"the calibration inputs of {name} hold NaN or Inf; check the data and the model's dtype.")
        return quantizer.fit(values)
