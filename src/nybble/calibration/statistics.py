"""What solvers need to know of a layer's inputs: the second moment, and the range for static activations.

Where several processes share the batches (:mod:`nybble.core.ranks`), each gathers its own, and ``merge`` makes one of
all: the same in every process, and what one process by itself comes to. So sums over batches, of float32 terms, are
float64: these are exact unless terms are 2^25 apart, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nybble.calibration.error import Drift
from nybble.core import ranks
from nybble.core.errors import DataError
from nybble.core.matmul import cross_gram, gram
from nybble.qtensor import QuantParams
from nybble.quantizer import Quantizer

_SAMPLE = 1 << 20


class SecondMoment:
    """Mean of ``x x^T`` over all tokens: of each batch in float32, these added in float64.

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
        self._mean: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Count the tokens of ``x`` [..., columns]; not after :meth:`mean`."""
        if self.inputs is not None:
            x = self.inputs.fake_quantize(x, self.params)
        flat = x if self.groups > 1 else x.reshape(-1, self.columns)
        if not flat.shape[-2]:
            return
        self._sum = _more(self._sum, gram(flat))
        self.tokens += flat.shape[-2]

    def merge(self, device: torch.device) -> bool:
        """Make one of all ranks' ``device``: of the sum."""
        self.tokens, self._sum = sum(ranks.gather(self.tokens)), ranks.total(self._sum, device)
        return True

    def mean(self, name: str) -> Tensor | None:
        """float32 [columns, columns] ([groups, ...] of groups), or None if no token came.

        Raises:
            DataError: it isn't finite; names the layer.
        """
        if self._mean is None and self._sum is not None:
            self._mean, self._sum = self._sum.div_(self.tokens).float(), None  # the matrix may be large
            if not bool(torch.isfinite(self._mean).all()):
                raise DataError(
                    f"the calibration inputs of {name} hold NaN or Inf (or overflow); check the data and the model's "
                    "dtype."
                )
        return self._mean


class GuidedMoments:
    """Second moments for groups of output channels, tokens weighed by what these outputs mean to the end loss.

    Of group k the mean of ``g_k x x^T``, g_k the mean over its channels of the loss's squared gradient by the output
    (Kim et al. 2025, GuidedQuant, arXiv:2505.07004, section 3), over its mean over all tokens: where all tokens matter
    alike it is the plain moment.

    Args:
        columns, inputs, params: as for :class:`SecondMoment`.
        guide: [tokens, groups], of this process's tokens in the order in which they will come.
    """

    def __init__(
        self, columns: int, guide: Tensor, inputs: Quantizer | None = None, params: QuantParams | None = None
    ) -> None:
        self.columns, self.inputs, self.params = columns, inputs, params
        self._total = sum(ranks.gather(len(guide)))
        sums = ranks.total(guide.double().sum(0), guide.device)
        assert sums is not None
        mean = sums / self._total
        wide = torch.where(mean > 0, guide.double() / mean, 1.0).float()
        self._roots, self._seen = wide.sqrt_(), 0
        self._mean: Tensor | None = None
        self._sum: list[Tensor | None] = [None] * guide.shape[1]

    def add(self, x: Tensor) -> None:
        """Count the tokens of ``x`` [..., columns]; not after :meth:`mean`."""
        exact = x.dtype != torch.bfloat16
        x = x if self.inputs is None else self.inputs.fake_quantize(x, self.params)
        flat = x.reshape(-1, self.columns)
        roots = self._roots[self._seen : self._seen + len(flat)].to(flat.device)
        self._seen += len(flat)
        if not len(flat) or len(roots) != len(flat):
            return
        for group in range(roots.shape[1]):
            weighed = flat.float() * roots[:, group, None]
            self._sum[group] = _more(self._sum[group], cross_gram(weighed, weighed, exact))

    def merge(self, device: torch.device) -> bool:
        """Make one of all ranks' ``device``: of the sums."""
        found = ranks.gather((self._seen, len(self._roots)))
        fits = all(seen == known for seen, known in found)  # else other tokens came than those that gave gradients
        self._sum = [ranks.total(each, device) if fits else None for each in self._sum]
        return True

    def mean(self, name: str) -> Tensor | None:
        """float32 [groups, columns, columns]; None where other tokens came than those that gave gradients.

        Raises:
            DataError: it isn't finite; names the layer.
        """
        if self._mean is None and self._seen == len(self._roots):
            sums = [each for each in self._sum if each is not None]
            if not sums:
                return None
            self._mean = torch.stack([each.div_(self._total).float() for each in sums])
            self._sum = [None] * len(sums)
            if not bool(torch.isfinite(self._mean).all()):
                raise DataError(
                    f"the weighed calibration inputs of {name} hold NaN or Inf (or overflow); check the data and the "
                    "model's dtype, or leave guided out."
                )
        return self._mean


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
        self._power, self._cross = _more(self._power, power), _more(self._cross, cross)
        self.tokens += x.shape[-2]

    def merge(self, device: torch.device) -> bool:
        """Make one of all ranks' ``device``: of the sums."""
        found = ranks.gather((self.tokens, self.paired))
        self.tokens, self.paired = sum(tokens for tokens, _ in found), all(paired for _, paired in found)
        self._power, self._cross = ranks.total(self._power, device), ranks.total(self._cross, device)
        return True

    def end_batch(self) -> None:
        """After a batch: nothing expected may be left."""
        self.paired &= not self._expected
        self._expected.clear()

    def mean(self) -> Drift | None:
        """Both moments, or None where no token came or tokens don't correspond."""
        if self._power is None or self._cross is None or not self.paired:
            return None
        return Drift(power=(self._power / self.tokens).float(), cross=(self._cross / self.tokens).float())


class ChannelSizes:
    """How large the channels of an input are: both ends, the largest and the mean magnitude, float32 [channels].

    Args:
        columns: how many channels. moment: gather the second moment too.
    """

    def __init__(self, columns: int, moment: bool = False) -> None:
        self.columns, self.tokens = columns, 0
        self.lowest: Tensor | None = None
        self.highest: Tensor | None = None
        self.moment = SecondMoment(columns) if moment else None
        self._sum: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Count the tokens of ``x`` [..., channels]."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows):
            low, high = rows.amin(0).float(), rows.amax(0).float()
            self.lowest = low if self.lowest is None else torch.minimum(self.lowest, low)
            self.highest = high if self.highest is None else torch.maximum(self.highest, high)
            self._sum = _more(self._sum, rows.abs().sum(0, dtype=torch.float32))
            self.tokens += len(rows)
        if self.moment is not None:
            self.moment.add(x)

    def merge(self, device: torch.device) -> bool:
        """Make one of all ranks' ``device``: of what is added up."""
        self.tokens, self._sum = sum(ranks.gather(self.tokens)), ranks.total(self._sum, device)
        self.lowest, self.highest = ranks.lowest(self.lowest, device), ranks.highest(self.highest, device)
        return True if self.moment is None else self.moment.merge(device)

    @property
    def largest(self) -> Tensor | None:
        """Magnitude; None before tokens came."""
        return None if self.lowest is None or self.highest is None else torch.maximum(-self.lowest, self.highest)

    @property
    def mean(self) -> Tensor:
        """Of magnitudes; only after tokens came."""
        assert self._sum is not None
        return (self._sum / self.tokens).float()


class InputSample:
    """Inputs as they come, evenly spread where there are more tokens than are wanted.

    Args:
        columns: width of the input. total: tokens that will come in all. most: tokens to keep. groups: as for
            :class:`SecondMoment`.
    """

    def __init__(self, columns: int, total: int, most: int, groups: int = 1) -> None:
        self.columns, self.stride, self.groups = columns, max(1, -(-total // most)), groups
        self.total, self._first, self._seen = total, 0, 0
        self._kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Count the tokens of ``x`` [..., columns]."""
        flat = x if self.groups > 1 else x.reshape(-1, self.columns)
        self._kept.append(flat[..., -self._seen % self.stride :: self.stride, :].clone())
        self._seen += flat.shape[-2]

    def begin(self, share: float) -> None:
        """Other ranks see this share of all tokens before those that come; a guess, which :meth:`merge` looks at."""
        self._first = self._seen = round(share * self.total)
        self._kept = []

    def merge(self, device: torch.device) -> bool:
        """Make one of all ranks' ``device``: of what others kept.

        Returns:
            False: the tokens of ranks don't join (padding, experts), so all is forgotten, to be seen by one alone.
        """
        found = ranks.gather((self._first, self._seen))
        joins = [0, *(seen for _, seen in found[:-1])]
        if any(first != before for (first, _), before in zip(found, joins, strict=True)):
            self.begin(0)
            return False
        self._kept = [kept for _, each in ranks.spread({ranks.number(): self._kept}, device) for kept in each]
        self._first, self._seen = 0, found[-1][1]
        return True

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
        self._begun, self._counts = self.stride, list[int]()
        self._samples: list[Tensor] = []
        self._ends: list[Tensor] = []
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
        self._ends.append(torch.stack([low, high]))
        self._counts.append(len(flat))
        if sum(map(len, self._samples)) > 4 * _SAMPLE:
            self._thin(2 * self.stride)

    def _stride(self, counts: Sequence[int]) -> int:
        """Every which value is kept of calls of these sizes: twice as many at each after which there are too many."""
        stride = self._begun
        for number in range(len(counts)):
            if sum(-(-count // stride) for count in counts[: number + 1]) > 4 * _SAMPLE:
                stride *= 2
        return stride

    def _thin(self, stride: int) -> None:
        if stride > self.stride:
            self._samples = [sample[:: stride // self.stride].clone() for sample in self._samples]
            self.stride = stride

    def merge(self, device: torch.device) -> bool:
        """Make one of all ranks' ``device``: of what others saw."""
        self._counts = [count for counts in ranks.gather(self._counts) for count in counts]
        self._thin(self._stride(self._counts))
        self._samples, self._ends = (
            [kept for _, each in ranks.spread({ranks.number(): own}, device) for kept in each]
            for own in (self._samples, self._ends)
        )
        self._low, self._high = ranks.lowest(self._low, device), ranks.highest(self._high, device)
        self._columns = ranks.highest(self._columns, device)
        return True

    def fit(self, quantizer: Quantizer, name: str) -> QuantParams:
        """Parameters of a static quantizer; absmax and minmax see the extremes, searching rules the sample.

        Rules of averages see every call's sample with its extremes.
        """
        if self._low is None or self._high is None:
            raise DataError(
                f"no calibration input reached {name}, so its activations have no scale; use a dynamic quantizer."
            )
        values = torch.cat([*self._samples, self._low[None], self._high[None]])
        if not bool(torch.isfinite(values[-2:]).all()):
            raise DataError(f"the calibration inputs of {name} hold NaN or Inf; check the data and the model's dtype.")
        if quantizer.scale.averages:
            each = [torch.cat(pair) for pair in zip(self._samples, self._ends, strict=True)]
            found = quantizer.scale.fit_ends(*quantizer.scale.averaged(each), quantizer.format)
            return quantizer.finish(found, quantizer.granularity.scale_shape(values.shape))
        if quantizer.granularity.calibrated_on == "columns" and self._columns is not None:
            return quantizer.fit(self._columns)
        return quantizer.fit(values)


def _more(total: Tensor | None, term: Tensor) -> Tensor:
    """A float64 sum with one float32 term more."""
    return term.double() if total is None else total.add_(term)
