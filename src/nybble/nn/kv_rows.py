"""Tokens in few bits that more tokens are appended to: what a KV cache holds of the keys, or values, of one layer.

Each stored tensor is [batch, heads, tokens, bytes or values of a row] (:mod:`nybble.nn.kv_layout`): appending,
cropping, and picking sequences of a batch move bytes and round nothing again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nybble.core.errors import GranularityError
from nybble.granularity import fitting_sizes
from nybble.nn.kv_layout import own
from nybble.nn.kv_operators import read_tokens, row_names, store_tokens, stored_rows
from nybble.qtensor import QTensor
from nybble.quantizer import Quantizer


class TokenRows:
    """Keys or values of one layer: [batch, heads, tokens, width], all but the newest tokens in few bits.

    Args:
        quantizer: with scales within a token (:class:`nybble.kv_format.KVFormat` sees to it); None stores float.
        residual: newest tokens left in float.
        like: [batch, heads, 0 or more, width], of the dtype that is read back; its values are not used.
        line: of the quantizer, for who has it.

    Raises:
        GranularityError: the width can't be cut as the quantizer asks.
    """

    def __init__(self, quantizer: Quantizer | None, residual: int, like: Tensor, line: str | None = None) -> None:
        if quantizer is not None:
            check_width(quantizer, like.shape[3])
        self.quantizer, self.residual = quantizer, residual
        self.line = str(quantizer or "") if line is None else line
        self.newest = like.new_empty((*like.shape[:2], 0, like.shape[3]))
        self._rows: dict[str, Tensor] = {}

    @property
    def rounded(self) -> int:
        """How many tokens are stored in few bits: the oldest ones."""
        return self._rows["codes"].shape[2] if self._rows else 0

    @property
    def tokens(self) -> int:
        """How many tokens are stored."""
        return self.rounded + self.newest.shape[2]

    def append(self, x: Tensor) -> None:
        """Store more tokens [batch, heads, tokens, width]; those that are no longer among the newest are rounded."""
        self.newest = torch.cat([self.newest, x.detach()], 2)
        leaving = self.newest.shape[2] - self.residual
        if self.quantizer is None or leaving <= 0:
            return
        found = store_tokens(self.newest[:, :, :leaving], self.line)
        self.newest = self.newest[:, :, leaving:].clone()
        rows = zip(row_names(self.line, self.newest.shape[3]).split(), found, strict=True)
        self._rows = {n: torch.cat([self._rows[n], t], 2) if self._rows else t for n, t in rows}

    def read(self) -> Tensor:
        """All tokens, in the dtype that came in."""
        if not self.rounded:
            return self.newest
        values: Tensor = read_tokens(list(self._rows.values()), " ".join(self._rows), self.line, self.newest)
        return values

    def rows(self) -> dict[str, Tensor]:
        """What is stored in few bits, by name, [batch, heads, tokens, ...] each; empty where nothing is."""
        return dict(self._rows) if self.rounded else {}

    def qtensor(self) -> QTensor | None:
        """The rounded tokens as [batch, heads, tokens, width]; None where there are none."""
        if not self.rounded:
            return None
        return stored_rows(list(self._rows.values()), " ".join(self._rows), self.line, self.newest)

    def drop_oldest(self, count: int) -> None:
        """Forget the first tokens."""
        old = min(count, self.rounded)
        self._each(lambda t: t[:, :, old:], lambda t: t[:, :, count - old :], count)

    def drop_newest(self, count: int) -> None:
        """Forget the last tokens; what was rounded stays so, even if it is among the newest now."""
        recent = min(count, self.newest.shape[2])
        left = max(0, self.rounded - (count - recent))
        self._each(lambda t: t[:, :, :left], lambda t: t[:, :, : t.shape[2] - recent], count)

    def select(self, batch: Tensor) -> None:
        """Take these sequences [n] of the batch, in this order; one may come several times."""
        chosen = batch.to(self.newest.device)
        self._each(lambda t: t[chosen], lambda t: t[chosen], 1)

    def tensors(self) -> dict[str, Tensor]:
        """What takes memory, by name: ``codes``, ``scale`` ..., ``newest``."""
        return {**self._rows, "newest": self.newest}

    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def _each(self, rounded: Callable[[Tensor], Tensor], newest: Callable[[Tensor], Tensor], count: int) -> None:
        if count <= 0:
            return
        self._rows = {name: own(rounded(t)) for name, t in self._rows.items()}
        self.newest = own(newest(self.newest))


def check_width(quantizer: Quantizer, width: int) -> None:
    """Raise GranularityError when rows of ``width`` can't be cut as the quantizer asks."""
    try:
        quantizer.granularity.check((1, 1, 1, width))
    except GranularityError as error:
        raise GranularityError(
            f"{quantizer}: a row of the KV cache is one head wide, {width} values, and '{quantizer.granularity}' does "
            f"not divide it. Sizes that do: {fitting_sizes(width)}. Or 'token' for one scale a row."
        ) from error
