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
        groups: of a grouped convolution, whose inputs come as [groups, tokens, columns]; 1 for all else.
    """

    def __init__(
        self, columns: int, inputs: Quantizer | None = None, params: QuantParams | None = None, groups: int = 1
    ) -> None:
        self.columns, self.inputs, self.params, self.groups = columns, inputs, params, groups
        self.tokens = 0
        self._sum: Tensor | None = None
        self._settled = False

    def add(self, x: Tensor) -> None:
        """Count the tokens of ``x`` [..., columns]; not after :meth:`mean`."""
        if self.inputs is not None:
            x = self.inputs.fake_quantize(x, self.params)
        flat = x if self.groups > 1 else x.reshape(-1, self.columns)
        if not flat.shape[-2]:
            return
        product = gram(flat)
        self._sum = product if self._sum is None else self._sum.add_(product)
        self.tokens += flat.shape[-2]

    def mean(self, name: str) -> Tensor | None:
        """float32 [columns, columns] ([groups, ...] of groups), or None if no token came.

        Raises:
            DataError: it isn't finite; names the layer.
        """
        if self._sum is None:
            return None
        if not bool(torch.isfinite(self._sum).all()):
            raise DataError(
                f"the calibration inputs of {name} hold NaN or Inf (or overflow); check the data and the model's dtype."
            )
        if not self._settled:  # in place: the matrix may be large; several recipes may ask
            self._sum.div_(self.tokens)
            self._settled = True
        return self._sum


class InputSample:
    """Inputs as they come, evenly spread where there are more tokens than are wanted.

    Args:
        columns: width of the input. total: tokens that will come in all. most: tokens to keep. groups: as for
            :class:`SecondMoment`.
    """

    def __init__(self, columns: int, total: int, most: int, groups: int = 1) -> None:
        self.columns, self.stride, self.groups = columns, max(1, -(-total // most)), groups
        self._seen = 0
        self._kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Count the tokens of ``x`` [..., columns]."""
        flat = x if self.groups > 1 else x.reshape(-1, self.columns)
        self._kept.append(flat[..., -self._seen % self.stride :: self.stride, :].clone())
        self._seen += flat.shape[-2]

    def all(self) -> Tensor | None:
        """[tokens, columns] ([groups, ...] of groups) in the model's dtype, or None if no token came."""
        return torch.cat(self._kept, -2) if self._seen else None


class Range:
    """Values seen, for one static scale: exact extremes, and an evenly spread sample of about a million others.

    Args:
        total: how many values will come in all; where more do (a convolution's inputs), the sample is thinned out.
    """

    def __init__(self, total: int) -> None:
        self.stride = max(1, total // _SAMPLE)
        self._samples: list[Tensor] = []
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._columns: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Count ``x`` [..., columns]."""
        if not x.numel():
            return
        columns = x.reshape(-1, x.shape[-1]).abs().amax(0).float()
        self._columns = columns if self._columns is None else torch.maximum(self._columns, columns)
        flat = x.reshape(-1).float()
        low, high = torch.aminmax(flat)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        self._samples.append(flat[:: self.stride].clone())
        if sum(map(len, self._samples)) > 4 * _SAMPLE:
            self.stride *= 2
            self._samples = [sample[::2].clone() for sample in self._samples]

    def fit(self, quantizer: Quantizer, name: str) -> QuantParams:
        """Parameters of a static quantizer; absmax and minmax see the extremes, searching rules the sample."""
        if self._low is None or self._high is None:
            raise DataError(
                f"no calibration input reached {name}, so its activations have no scale; use a dynamic quantizer."
            )
        values = torch.cat([*self._samples, self._low[None], self._high[None]])
        if not bool(torch.isfinite(values[-2:]).all()):
            raise DataError(f"the calibration inputs of {name} hold NaN or Inf; check the data and the model's dtype.")
        if quantizer.granularity.calibrated_on == "columns" and self._columns is not None:
            return quantizer.fit(self._columns)
        return quantizer.fit(values)
