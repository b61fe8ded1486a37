"""The inner loop of GPTQ: round the columns of one block in order, each error going into the columns after it.

On a GPU the loop is a few thousand tiny kernels, and launching them takes ten times as long as running them: there it
is recorded once as a CUDA graph for each shape and replayed. A graph runs the same kernels, so the numbers are the
same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from nybble.ops.blocks import safe_divisor, safe_reciprocal
from nybble.ops.rounding import round_to, round_to_codes
from nybble.quantizer import Quantizer

_RUN = 32  # columns between two products inside a block


@dataclass(frozen=True)
class Span:
    """Neighbouring rows that are rounded alike: one format, with a scale, zero point and offset for each element.

    Tensors are [columns, rows]; None where the quantizer has no such parameter.
    """

    rows: slice
    quantizer: Quantizer
    scale: Tensor | None
    zero: Tensor | None
    offset: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Scale, zero point and offset."""
        return self.scale, self.zero, self.offset

    def ordered(self, order: Tensor) -> Span:
        """With the columns in another order."""
        return Span(self.rows, self.quantizer, *(None if t is None else t[order] for t in self.tensors))

    def columns(self, start: int, stop: int) -> Span:
        """Only the columns ``start .. stop``."""
        return Span(self.rows, self.quantizer, *(None if t is None else t[start:stop] for t in self.tensors))

    def divisor(self) -> Tensor | None:
        """What all columns are divided by, or multiplied with under ``reciprocal``: for :meth:`round_column`."""
        if self.scale is None:
            return None
        return safe_reciprocal(self.scale) if self.quantizer.reciprocal else safe_divisor(self.scale)

    def round_column(self, w: Tensor, column: int, divisor: Tensor | None) -> Tensor:
        """One column [rows] on its grid, as the quantizer will store it."""
        fmt, rounding = self.quantizer.format, self.quantizer.rounding
        y = w if self.offset is None else w - self.offset[column]
        if divisor is not None:
            y = y * divisor[column] if self.quantizer.reciprocal else y / divisor[column]
        if self.zero is None:
            y = round_to(y, fmt.name, rounding)
        else:
            zero = self.zero[column]
            y = round_to_codes(y, zero, fmt.min, fmt.max, rounding) - zero
        y = y if self.scale is None else y * self.scale[column]
        return y if self.offset is None else y + self.offset[column]


def visit_block(part: Tensor, upper: Tensor, spans: Sequence[Span], result: Tensor) -> Tensor:
    """Round the columns of one block into ``result``.

    Inside, columns go in runs of a few, so that most of the updating is a product and little of it column by column.

    Args:
        part: float32 [columns, rows], the block of the transposed weight; overwritten.
        upper: float32 [columns, columns], the block of the Cholesky factor of the inverse.
        spans: all rows.
        result: like ``part``.

    Returns:
        float32 [columns, rows]: the errors over the pivots, for the columns after the block.
    """
    errors = torch.empty_like(part)
    columns, divisors = part.shape[0], [span.divisor() for span in spans]
    for start in range(0, columns, _RUN):
        stop = min(start + _RUN, columns)
        for j in range(start, stop):
            w = part[j]
            for span, divisor in zip(spans, divisors, strict=True):
                result[j, span.rows] = span.round_column(w[span.rows], j, divisor)
            torch.sub(w, result[j], out=errors[j]).div_(upper[j, j])
            if j + 1 < stop:
                part[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j], alpha=-1)
        if stop < columns:
            part[stop:].addmm_(upper[start:stop, stop:].T, errors[start:stop], alpha=-1)
    return errors


def visit_block_in_graph(part: Tensor, upper: Tensor, spans: Sequence[Span], result: Tensor) -> Tensor:
    """:func:`visit_block` by a recorded CUDA graph; same arguments, same result."""
    rows = tuple((s.rows.start, s.rows.stop) for s in spans)
    present = tuple(tuple(t is not None for t in s.tensors) for s in spans)
    graph = _recorded(tuple(part.shape), rows, tuple(s.quantizer for s in spans), present, part.device)
    return graph.run(part, upper, spans, result)


class _Recorded:
    """A graph of :func:`visit_block` over buffers of its own."""

    def __init__(self, part: Tensor, upper: Tensor, spans: Sequence[Span]) -> None:
        self.part, self.upper, self.spans = part, upper, spans
        self.result = torch.empty_like(part)
        side = torch.cuda.Stream(part.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(part.device))
        with torch.cuda.stream(side):  # first calls allocate tables and workspaces, which a recording must not
            visit_block(part, upper, spans, self.result)
        torch.cuda.current_stream(part.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may call what they like
            self.errors = visit_block(part, upper, spans, self.result)

    def run(self, part: Tensor, upper: Tensor, spans: Sequence[Span], result: Tensor) -> Tensor:
        """Copy in, replay, copy out."""
        self.part.copy_(part)
        self.upper.copy_(upper)
        for own, span in zip(self.spans, spans, strict=True):
            for buffer, tensor in zip(own.tensors, span.tensors, strict=True):
                if buffer is not None and tensor is not None:
                    buffer.copy_(tensor)
        self.graph.replay()
        result.copy_(self.result)
        return self.errors.clone()


@lru_cache(maxsize=16)
def _recorded(
    shape: tuple[int, int],
    rows: tuple[tuple[int, int], ...],
    quantizers: tuple[Quantizer, ...],
    present: tuple[tuple[bool, ...], ...],
    device: torch.device,
) -> _Recorded:
    columns, width = shape
    spans = [
        Span(
            slice(a, b),
            q,
            *(torch.ones(columns, b - a, dtype=torch.float32, device=device) if has else None for has in found),
        )
        for (a, b), q, found in zip(rows, quantizers, present, strict=True)
    ]
    return _Recorded(
        torch.zeros(columns, width, dtype=torch.float32, device=device),
        torch.eye(columns, dtype=torch.float32, device=device),
        spans,
    )
