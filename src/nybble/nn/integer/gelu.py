"""GELU in integers: ``x (1 + erf(x / sqrt 2)) / 2``. Source: I-BERT (arXiv:2101.01321), section 3.4."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nybble.nn.integer.erf import integer_erf


def integer_gelu(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """``GELU(S q)``, off by 0.019 at most beside what the codes' steps add.

    Args:
        q: codes, magnitudes below 2^31.
        scale: as of :func:`nybble.nn.integer.erf.integer_erf`, times sqrt 2.

    Returns:
        Codes, int64, and their scale.
    """
    erf, fine = integer_erf(q, scale / math.sqrt(2))
    return q.to(torch.int64) * (erf + math.floor(1 / fine)), scale * fine / 2
