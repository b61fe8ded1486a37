"""Vector candidates: each run of weights chooses among the code words near it, while the code book learns (VQ4DiT).

    w_hat = sum_m r_m C[A_m],     r = softmax(z),     A: the n code words nearest to the run, C the code book
    penalty: sum_m (1 - |2 r_m - 1|), a mean over runs;     at the start r_m ~ 1 / |w - C[A_m]|, or 1 / n

Deng et al. 2024, "VQ4DiT: Efficient Post-Training Vector Quantization for Diffusion Transformers", arXiv:2408.17131,
section 3. A run whose largest ratio is above ``confident`` is frozen: its logits become 0 and :data:`FROZEN`, which
nothing moves any more. Once more than ``hardened`` of a layer's runs are, all of them are. Settled, a run is its
likeliest code word, at the start that of the solver; candidates stay those of the book at the start. The book is used
as it will be stored (float16), with the gradient straight through, and so are the solver's row scales, which stay.

``order``: in ``joint`` the book learns from the first step, as the paper's text has it; in ``release``, as in its code,
not before its layer is hardened. ``term``: the penalty above is the text's; ``product``, its code's, n mean(r - r^2).
With ``candidates=1`` the book alone learns. Row scales divide distances as in the solver; of a solver that weighs the
inputs the first candidate is its own choice, at the least distance of the others or less.

Where we differ: distances get 1e-5 of their mean added, not 1e-5, so that weights of any size begin alike; the penalty
sets in at ``warmup``, a share of the steps, where the code waits until the loss stops falling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.core.errors import SchemeError
from nybble.learned import WEIGHTS, Learned
from nybble.learned._vectors import VectorPart
from nybble.ops.grid import straight_through
from nybble.qtensor import QTensor, QuantParams, dense
from nybble.qtensor.vector import VectorQTensor, VectorQuantizer, divisor, rows_at_once
from nybble.quantizer import Quantizer

FROZEN = 1e4
"""The logit of a frozen run's code word; a softmax of it and zeros is one and zeros exactly."""
_TINY = 1e-5


class Candidates(Learned):
    """See the module.

    Args:
        quantizer: what the scheme names beside the code book.
        x: the weight, float32 [out, in].
        start: what the solver made of it.
        options: of the part.
    """

    nearest = False

    def __init__(self, quantizer: Quantizer, x: Tensor, start: VectorQTensor, options: VectorCandidates) -> None:
        super().__init__(quantizer, WEIGHTS)
        self.options, self._start = options, start
        count = min(options.candidates, len(start.codebook))
        scale = None if start.scale is None else dense(start.scale)
        runs = (x if scale is None else x / divisor(scale)).reshape(-1, start.codebook.shape[1])
        chosen, distance = near(runs, start.codebook.float(), start.index(), count)
        self.candidates: Tensor
        self.register_buffer("candidates", chosen)
        self.codebook = nn.Parameter(start.codebook.float())
        self.logits = nn.Parameter(self._begin(distance))

    def _begin(self, distance: Tensor) -> Tensor:
        """Logits of ratios in proportion to 1 / distance; 0 for the last."""
        if self.options.ratios == "equal":
            return torch.zeros_like(distance)
        raised = distance + _TINY * distance.mean().clamp(min=torch.finfo(torch.float32).tiny)
        return (raised[:, -1:] / raised).log()

    def ratios(self) -> Tensor:
        """r, float32 [runs, n]; rows sum to 1."""
        return self.logits.softmax(1)

    def frozen(self) -> Tensor:
        """Which are decided for good: bool [runs]."""
        return self.logits.detach().amax(1) > FROZEN / 2

    def codes(self) -> Tensor:
        """int64 [runs]: the likeliest candidate, the first of equal ones."""
        return self.candidates.gather(1, _first_largest(self.logits.detach())[:, None])[:, 0].long()

    @torch.no_grad()
    def _freeze(self) -> None:
        """Freeze runs that are confident; and a layer of which most are. No decision waits for the device."""
        sure = self.ratios().amax(1) > self.options.confident
        sure |= sure.float().mean() > self.options.hardened
        first = _first_largest(self.logits)[:, None] == torch.arange(self.logits.shape[1], device=sure.device)
        self.logits.copy_(torch.where(sure[:, None], FROZEN * first, self.logits))

    def estimate(self, x: Tensor) -> Tensor:
        """The weighted sum of candidates, of the shape and dtype of ``x``; of frozen runs the ratios' gradient is 0."""
        self._freeze()
        book: Tensor = self.codebook
        if self.options.order == "release":
            book = torch.where(self.frozen().all(), book, book.detach())
        book = straight_through(self._stored().float(), book)
        # embedding: the sum of its gradient is in the same order at every run, on a GPU too
        runs = (self.ratios()[..., None] * functional.embedding(self.candidates, book)).sum(1)
        values = runs.reshape(self._start.shape)
        return (values if self._start.scale is None else values * dense(self._start.scale)).to(x.dtype)

    def _stored(self) -> Tensor:
        """The book in the dtype of the solver's."""
        dtype = self._start.codebook.dtype
        most = torch.finfo(dtype).max
        return self.codebook.detach().clamp(-most, most).to(dtype)

    def settle(self, x: Tensor) -> QTensor | QuantParams:  # noqa: D102
        return VectorQTensor.make(self._start.shape, self._stored(), self.codes(), self._start.scale)

    def penalty(self, t: float | Tensor) -> Tensor:
        """A mean over runs, times the number of weights: what the engine takes is a sum over these."""
        r, weights = self.ratios(), math.prod(self._start.shape)
        if self.options.term == "product":
            term = r.shape[1] * (r * (1 - r)).mean()
        else:
            term = (1 - (2 * r - 1).abs()).sum(1).mean()
        begun = torch.as_tensor(t, dtype=torch.float32, device=r.device) >= self.options.warmup
        return torch.where(begun, term * weights, 0.0)

    def groups(self) -> dict[str, list[nn.Parameter]]:  # noqa: D102
        return {"ratios": [self.logits], "codebook": [self.codebook]}

    def _apply(self, fn: Any, recurse: bool = True) -> Learned:
        found = super()._apply(fn, recurse)
        self._start = self._start.to(self.codebook.device)
        return found

    def extra_repr(self) -> str:  # noqa: D102
        return f"{len(self.codebook)} code words of {self.codebook.shape[1]}, {self.logits.shape[1]} candidates"


def near(runs: Tensor, book: Tensor, first: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The code words nearest to each run, ``first`` in front, the others by distance.

    Args:
        runs: float32 [n, d].
        book: float32 [k, d].
        first: int64 [n], what was chosen already.
        count: how many, 1 to k.

    Returns:
        int32 [n, count], and their Euclidean distances, float32, ascending: what was chosen counts as no farther than
        the next, in whatever measure it was chosen.
    """
    indices, distances, rows = [], [], rows_at_once(len(book))
    for x, own in zip(torch.split(runs, rows), torch.split(first, rows), strict=True):
        apart = torch.cdist(x, book, compute_mode="donot_use_mm_for_euclid_dist")
        at = own[:, None]
        distance = torch.minimum(apart.gather(1, at), apart.amin(1, keepdim=True))
        if count > 1:
            others = apart.scatter(1, at, torch.inf).topk(count - 1, 1, largest=False)
            distance, at = torch.cat([distance, others.values], 1), torch.cat([at, others.indices], 1)
        indices.append(at.int())
        distances.append(distance)
    return torch.cat(indices), torch.cat(distances)


def _first_largest(logits: Tensor) -> Tensor:
    """int64 [runs]: of equal ones the first, on every device."""
    places = torch.arange(logits.shape[1], device=logits.device)
    return torch.where(logits == logits.amax(1, keepdim=True), places, len(places) - 1).amin(1)


@dataclass(frozen=True, kw_only=True)
class VectorCandidates(VectorPart):
    """Options of the method.

    Attributes:
        candidates: n; 1 leaves every run its code word. At most the entries of the book; of a small matrix, whose book
            is smaller, all of these.
        ratios: what they begin at, in proportion to 1 / ``distance``, or ``equal``.
        order: when the book learns: ``joint`` or ``release``.
        term: the penalty: ``absolute`` (the paper's text) or ``product`` (its code).
        warmup: the share of training without the penalty.
        confident: the ratio above which a run is frozen. hardened: the share of frozen runs above which all are.
    """

    candidates: int = 2
    ratios: Literal["distance", "equal"] = "distance"
    order: Literal["joint", "release"] = "joint"
    term: Literal["absolute", "product"] = "absolute"
    warmup: float = 0.0
    confident: float = 0.99
    hardened: float = 0.99

    groups = ("ratios", "codebook")
    fixes_x = True
    soft = True

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise SchemeError(f"vector-candidates: candidates={self.candidates}; at least one.")
        if not 0 <= self.warmup < 1 or not 0.5 <= self.confident < 1 or not 0.5 <= self.hardened < 1:
            raise SchemeError(
                "vector-candidates: warmup is 0 to below 1, confident and hardened 0.5 to below 1; got "
                f"{self.warmup:g}, {self.confident:g}, {self.hardened:g}."
            )

    def check_book(self, book: VectorQuantizer) -> None:  # noqa: D102
        if self.candidates > book.k:
            raise SchemeError(
                f"vector-candidates: candidates={self.candidates} code words of a book of {book.k}; take {book.k} or "
                "fewer, or more entries."
            )

    def make_vectors(self, quantizer: Quantizer, x: Tensor, start: VectorQTensor) -> Learned:  # noqa: D102
        return Candidates(quantizer, x.detach(), start, self)


PART = VectorCandidates
