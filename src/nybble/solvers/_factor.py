"""A second moment, damped, as GPTQ needs it: U with U^T U = H^-1; and the least-squares weights that go by it."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.calibration.error import by_group


def factorised(
    second_moment: Tensor, damping: float, reorder: bool
) -> tuple[tuple[Tensor, Tensor | None] | None, tuple[str, ...]]:
    """Upper Cholesky factor of the damped inverse, the order of columns, and notes; None if no damping helped.

    Of moments [groups, columns, columns] all factors at once; their columns stay in their order.

    Args:
        second_moment: H, float32 [columns, columns], or [groups, columns, columns].
        damping: share of the mean diagonal that is added to it; more where it can't be factorised.
        reorder: let columns with large inputs come first.
    """
    diagonal = second_moment.diagonal(dim1=-2, dim2=-1).clone()
    dead = diagonal == 0
    diagonal[dead] = 1
    notes = [f"{int(dead.sum())} inputs are always zero"] if bool(dead.any()) else []
    grouped = diagonal.dim() > 1
    order = diagonal.argsort(descending=True, stable=True) if reorder and not grouped else None
    ordered = diagonal if order is None else diagonal[order]
    mean = ordered.mean(-1)
    shares = torch.full_like(mean, damping)
    for attempt in range(4):
        # With its rows and columns reversed, H = M M^T for an upper M, and H^-1 = U^T U for U = M^-1: no inverse,
        # and one factorisation less than chol(H^-1). As few as can be of these matrices are there at once.
        damped = ordered + (shares * mean)[..., None]
        reversed_lower, info = torch.linalg.cholesky_ex(_backwards(second_moment, order, damped))
        failed = info != 0
        m = reversed_lower.flip(-2, -1)
        del reversed_lower
        identity = torch.eye(diagonal.shape[-1], dtype=diagonal.dtype, device=diagonal.device)
        if bool(failed.any()):
            m = torch.where(failed[..., None, None], identity, m)
        upper = torch.linalg.solve_triangular(m, identity.expand_as(m), upper=True)
        del m, identity
        failed = failed | ~torch.isfinite(upper).all(-1).all(-1)
        if not bool(failed.any()):
            if attempt:
                notes.append(f"damping raised to {float(shares.max()):g}")
            return (upper, order), tuple(notes)
        shares = torch.where(failed, shares.clamp_min(1e-4) * 10, shares)
    notes.append(
        f"the second moment can't be factorised even with damping {float(shares.max()) / 10:g}: rounded to nearest"
    )
    return None, tuple(notes)


def least_squares(matrix: Tensor, cross: Tensor, upper: Tensor, order: Tensor | None) -> Tensor:
    """``W + W C H^-1``; for C = E[d x^T] the weights that give the float outputs best on these inputs.

    Args:
        matrix: W, float32 [rows, columns].
        cross: C, float32 [columns, columns], or [groups, columns, columns].
        upper: U with U^T U = H^-1, its columns in ``order``.
        order: int64 [columns], or None.
    """
    lacking = by_group(matrix, cross) @ cross
    if order is not None:
        lacking = lacking[:, order]
    moved = lacking @ upper.mT @ upper
    if order is not None:
        moved = torch.empty_like(moved).index_copy_(1, order, moved)
    return matrix + moved.reshape(matrix.shape)


def _backwards(second_moment: Tensor, order: Tensor | None, diagonal: Tensor) -> Tensor:
    """The second moment with its columns in order, and that reversed, and another diagonal (in order)."""
    if order is None:
        h = second_moment.flip(-2, -1)
    else:
        back = order.flip(0)
        h = second_moment.index_select(0, back).index_select(1, back)
    h.diagonal(dim1=-2, dim2=-1).copy_(diagonal.flip(-1))
    return h
