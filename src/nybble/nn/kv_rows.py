"""Tokens in few bits that more tokens are appended to: what a KV cache holds of the keys, or values, of one layer.

Each stored tensor is [batch, heads, tokens, bytes or values of a row] (:mod:`nybble.nn.kv_layout`; scales along tokens
have a row a block): appending, cropping, and picking sequences of a batch move bytes and round nothing again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.core.errors import GranularityError, UsageError
from nybble.granularity import fitting_sizes
from nybble.kv_format import tokens_a_scale
from nybble.nn.kv_basis import Basis
from nybble.nn.kv_layout import own
from nybble.nn.kv_operators import read_tokens, row_names, store_tokens, stored_rows
from nybble.qtensor import QTensor
from nybble.quantizer import Quantizer


class TokenRows:
    """Keys or values of one layer: [batch, heads, tokens, width], all but some tokens in few bits.

    The first ``sink`` tokens and the newest stay in float; with scales along tokens (``block=32x1``) so do those whose
    block isn't full.

    Args:
        quantizer: one that a cache can have (:class:`nybble.kv_format.KVFormat` sees to it); None stores float.
        residual: newest tokens left in float.
        like: [batch, heads, 0 or more, width], of the dtype that is read back; its values are not used.
        line: of the quantizer, for who has it.
        sink: first tokens left in float.
        basis: in which tokens are rounded; what is in float stays as it came.

    Raises:
        GranularityError: the width can't be cut as the quantizer asks.
    """

    def __init__(
        self,
        quantizer: Quantizer | None,
        residual: int,
        like: Tensor,
        line: str | None = None,
        sink: int = 0,
        basis: Basis | None = None,
    ) -> None:
        self.span = 1 if quantizer is None else tokens_a_scale(quantizer)
        if quantizer is not None:
            check_width(quantizer, like.shape[3])
        self.quantizer, self.residual, self.basis = quantizer, residual, basis
        self.line = str(quantizer or "") if line is None else line
        self.newest = like.new_empty((*like.shape[:2], 0, like.shape[3]))
        self.first = self.newest
        self._open = 0 if quantizer is None else sink  # places of first tokens that are still free
        self._hidden = 0  # tokens of the oldest block that were dropped
        self._rows: dict[str, Tensor] = {}
        self._spans: dict[str, int] = {}  # tokens that a row of each has

    @property
    def rounded(self) -> int:
        """How many tokens are stored in few bits: the oldest ones behind the first."""
        return self._rows["codes"].shape[2] - self._hidden if self._rows else 0

    @property
    def tokens(self) -> int:
        """How many tokens are stored."""
        return self.first.shape[2] + self.rounded + self.newest.shape[2]

    @property
    def plain(self) -> bool:
        """Whether all is as attention's operator takes it: rows of a token each, and behind them newest tokens."""
        return self.span == 1 and not (self._open or self.first.shape[2])

    def append(self, x: Tensor) -> None:
        """Store more tokens [batch, heads, tokens, width]; those that are no longer among the newest are rounded."""
        x = x.detach()
        if self._open:
            taken = min(self._open, x.shape[2])
            self.first, x = torch.cat([self.first, x[:, :, :taken]], 2), x[:, :, taken:]
            self._open -= taken
        self.newest = torch.cat([self.newest, x], 2)
        leaving = self.newest.shape[2] - self.residual
        if self.span > 1:
            leaving -= leaving % self.span
        if self.quantizer is None or leaving <= 0:
            return
        oldest = self.newest[:, :, :leaving]
        found = store_tokens(oldest if self.basis is None else self.basis.into(oldest), self.line)
        self.newest = self.newest[:, :, leaving:].clone()
        rows = dict(zip(row_names(self.line, self.newest.shape[3]).split(), found, strict=True))
        self._spans = {n: self.span if self.span > 1 and t.shape[2] < leaving else 1 for n, t in rows.items()}
        self._rows = {n: torch.cat([self._rows[n], t], 2) if self._rows else t for n, t in rows.items()}

    def read(self) -> Tensor:
        """All tokens, in the dtype that came in."""
        if not self.rounded:
            return torch.cat([self.first, self.newest], 2) if self.first.shape[2] else self.newest
        behind = self.newest if self.basis is None else self.newest[:, :, :0].float()
        names = " ".join(self._rows)
        values: Tensor = read_tokens(list(self._rows.values()), names, self.line, behind)
        values = values[:, :, self._hidden :] if self._hidden else values
        if self.basis is not None:
            values = torch.cat([self.basis.back(values).to(self.newest.dtype), self.newest], 2)
        return torch.cat([self.first, values], 2) if self.first.shape[2] else values

    def rows(self) -> dict[str, Tensor]:
        """What is stored in few bits, by name, [batch, heads, tokens, ...] each; empty where nothing is."""
        return dict(self._rows) if self.rounded else {}

    def qtensor(self) -> QTensor | None:
        """The rounded tokens [batch, heads, tokens, width], in the basis, in whole blocks; None if there are none."""
        if not self.rounded:
            return None
        return stored_rows(list(self._rows.values()), " ".join(self._rows), self.line, self.newest)

    def drop_oldest(self, count: int) -> None:
        """Forget the first tokens."""
        if count <= 0:
            return
        first = min(count, self.first.shape[2])
        old = min(count - first, self.rounded)
        self.first = own(self.first[:, :, first:])
        start = self._hidden + old
        self._hidden = start % self.span
        self._rows = {n: own(t[:, :, (start - self._hidden) // self._spans[n] :]) for n, t in self._rows.items()}
        self.newest = own(self.newest[:, :, count - first - old :])

    def check_drop(self, count: int) -> None:
        """Raise UsageError where dropping so many of the newest tokens would cut a block that shares scales."""
        left = self.rounded - max(0, count - self.newest.shape[2])
        if left > 0 and (self._hidden + left) % self.span:
            raise UsageError(
                f"the newest {count} tokens can't be taken back: some share scales with {self.span - 1} others "
                f"({self.line}). Write residual=N with N tokens or more that may be taken back."
            )

    def drop_newest(self, count: int) -> None:
        """Forget the last tokens; what was rounded stays so, even if it is among the newest now.

        Raises:
            UsageError: as :meth:`check_drop`.
        """
        self.check_drop(count)
        if count <= 0:
            return
        recent = min(count, self.newest.shape[2])
        old = min(count - recent, self.rounded)
        left = self._hidden + self.rounded - old if old < self.rounded else 0
        again = min(count - recent - old, self.first.shape[2])
        self._hidden = self._hidden if left else 0
        self._rows = {n: own(t[:, :, : left // self._spans[n]]) for n, t in self._rows.items()}
        self.newest = own(self.newest[:, :, : self.newest.shape[2] - recent])
        self.first = own(self.first[:, :, : self.first.shape[2] - again])
        self._open += again

    def select(self, batch: Tensor) -> None:
        """Take these sequences [n] of the batch, in this order; one may come several times."""
        chosen = batch.to(self.newest.device)
        self.first, self.newest = own(self.first[chosen]), own(self.newest[chosen])
        self._rows = {name: own(t[chosen]) for name, t in self._rows.items()}

    def tensors(self) -> dict[str, Tensor]:
        """What takes memory, by name: ``codes``, ``scale`` ..., ``newest``, and ``first`` where some are kept."""
        kept = {"first": self.first} if self.first.shape[2] else {}
        return {**self._rows, **kept, "newest": self.newest}

    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


def check_width(quantizer: Quantizer, width: int) -> None:
    """Raise GranularityError when rows of ``width`` can't be cut as the quantizer asks."""
    try:
        quantizer.granularity.check((1, 1, tokens_a_scale(quantizer), width))
    except GranularityError as error:
        raise GranularityError(
            f"{quantizer}: a row of the KV cache is one head wide, {width} values, and '{quantizer.granularity}' does "
            f"not divide it. Sizes that do: {fitting_sizes(width)}. Or 'token' for one scale a row."
        ) from error
