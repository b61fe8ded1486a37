"""What solvers need to know of a layer's inputs: the second moment, and the range for static activations."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.calibration.error import Drift
from nybble.core.errors import DataError
from nybble.core.matmul import cross_gram, gram
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


class GuidedMoments:
    """Second moments for groups of output channels, tokens weighed by what these outputs mean to the end loss.

    Of group k the mean of ``g_k x x^T``, g_k the mean over its channels of the loss's squared gradient by the output
    (Kim et al. 2025, GuidedQuant, arXiv:2505.07004, section 3), over its mean over all tokens: where all tokens matter
    alike it is the plain moment.

    Args:
        columns, inputs, params: as for :class:`SecondMoment`.
        guide: [tokens, groups], of all tokens in the order in which they will come.
    """

    def __init__(
        self, columns: int, guide: Tensor, inputs: Quantizer | None = None, params: QuantParams | None = None
    ) -> None:
        self.columns, self.inputs, self.params = columns, inputs, params
        mean = guide.double().mean(0)
        wide = torch.where(mean > 0, guide.double() / mean, 1.0).float()
        self._roots, self._seen, self._settled = wide.sqrt_(), 0, False
        self._sum: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Count the tokens of ``x`` [..., columns]; not after :meth:`mean`."""
        exact = x.dtype != torch.bfloat16
        x = x if self.inputs is None else self.inputs.fake_quantize(x, self.params)
        flat = x.reshape(-1, self.columns)
        roots = self._roots[self._seen : self._seen + len(flat)].to(flat.device)
        self._seen += len(flat)
        if not len(flat) or len(roots) != len(flat):
            return
        if self._sum is None:
            self._sum = torch.zeros(roots.shape[1], self.columns, self.columns, dtype=torch.float32, device=flat.device)
        for group in range(roots.shape[1]):
            weighed = flat.float() * roots[:, group, None]
            self._sum[group] += cross_gram(weighed, weighed, exact)

    def mean(self, name: str) -> Tensor | None:
        """float32 [groups, columns, columns]; None where other tokens came than those that gave gradients.

        Raises:
            DataError: it isn't finite; names the layer.
        """
        if self._sum is None or self._seen != len(self._roots):
            return None
        if not bool(torch.isfinite(self._sum).all()):
            raise DataError(
                f"the weighed calibration inputs of {name} hold NaN or Inf (or overflow); check the data and the "
                "model's dtype, or leave guided out."
            )
        if not self._settled:
            self._sum.div_(self._seen)
            self._settled = True
        return self._sum


def row_groups(rows: int, wanted: int) -> int:
    """How many groups of equally many neighbouring rows there are: as many as are wanted, or the next fewer."""
    return next(count for count in range(min(rows, wanted), 0, -1) if rows % count == 0)


class DriftMoments:
    """Moments of what inputs differ from the float network's, token by token: :class:`~nybble.calibration.error.Drift`.

    Every batch is run twice: on the float path, whose inputs are kept (:meth:`expect`), then on the other one
    (:meth:`add`). Where calls or tokens don't correspond (experts that route otherwise), nothing can be said.

    Args:
        columns, inputs, params, groups: as for :class:`SecondMoment`; the float network's inputs aren't quantized.
    """

    def __init__(
        self, columns: int, inputs: Quantizer | None = None, params: QuantParams | None = None, groups: int = 1
    ) -> None:
        self.columns, self.inputs, self.params, self.groups = columns, inputs, params, groups
        self.tokens, self.paired = 0, True
        self._expected: list[Tensor] = []
        self._power: Tensor | None = None
        self._cross: Tensor | None = None

    def expect(self, x: Tensor) -> None:
        """The float network's inputs, as :meth:`add` will get the others."""
        self._expected.append(x)

    def add(self, x: Tensor) -> None:
        """Count the tokens of ``x`` [..., columns]; not after :meth:`mean`."""
        wanted = self._expected.pop(0) if self._expected else None
        if wanted is None or wanted.shape != x.shape:
            self.paired = False
            return
        exact = x.dtype != torch.bfloat16
        x = x if self.inputs is None else self.inputs.fake_quantize(x, self.params)
        wanted, x = (t.float() if self.groups > 1 else t.reshape(-1, self.columns).float() for t in (wanted, x))
        if not x.shape[-2]:
            return
        wanted = wanted - x
        power, cross = cross_gram(wanted, wanted, exact), cross_gram(wanted, x, exact)
        self._power = power if self._power is None else self._power.add_(power)
        self._cross = cross if self._cross is None else self._cross.add_(cross)
        self.tokens += x.shape[-2]

    def end_batch(self) -> None:
        """After a batch: nothing expected may be left."""
        self.paired &= not self._expected
        self._expected.clear()

    def mean(self) -> Drift | None:
        """Both moments, or None where no token came or tokens don't correspond."""
        if self._power is None or self._cross is None or not self.paired:
            return None
        return Drift(power=self._power / self.tokens, cross=self._cross / self.tokens)


class ChannelSizes:
    """How large the channels of an input are: both ends, the largest and the mean magnitude, float32 [channels].

    Args:
        columns: how many channels. moment: gather the second moment too.
    """

    def __init__(self, columns: int, moment: bool = False) -> None:
        self.tokens = 0
        self.lowest: Tensor | None = None
        self.highest: Tensor | None = None
        self.moment = SecondMoment(columns) if moment else None
        self._sum = torch.zeros(columns, dtype=torch.float32)

    def add(self, x: Tensor) -> None:
        """Count the tokens of ``x`` [..., channels]."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows):
            low, high = rows.amin(0).float(), rows.amax(0).float()
            self.lowest = low if self.lowest is None else torch.minimum(self.lowest, low)
            self.highest = high if self.highest is None else torch.maximum(self.highest, high)
            self._sum = self._sum.to(x.device) + rows.abs().sum(0, dtype=torch.float32)
            self.tokens += len(rows)
        if self.moment is not None:
            self.moment.add(x)

    @property
    def largest(self) -> Tensor | None:
        """Magnitude; None before tokens came."""
        return None if self.lowest is None or self.highest is None else torch.maximum(-self.lowest, self.highest)

    @property
    def mean(self) -> Tensor:
        """Of magnitudes; only after tokens came."""
        return self._sum / self.tokens


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
