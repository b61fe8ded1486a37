"""The rows of a window's output that count."""

from __future__ import annotations

from torch import Tensor


def real_rows(output: Tensor, wanted: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both in float32; where they have rows for tokens, without those of padding (``mask``: bool, which are real)."""
    output, wanted = output.float(), wanted.float()
    if mask is not None and output.shape[:2] == mask.shape:
        output, wanted = output[mask], wanted[mask]
    return output, wanted
