"""AdamW with both moments in few bits between steps.

Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; Dettmers et al. 2022, arXiv:2110.02861 (8-bit states).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from nybble.optim import LowBitOptimizer
from nybble.optim._adam import AdamOptions, adam_step
from nybble.optim._common import Common
from nybble.optim._decays import shrunk
from nybble.optim._states import Kind


@dataclass(frozen=True, kw_only=True)
class AdamWOptions(AdamOptions):
    """As Adam's; ``weight_decay`` is a share of ``lr`` per step."""

    weight_decay: float = 1e-2


class AdamW(LowBitOptimizer):
    """``torch.optim.AdamW`` whose moments are kept by Quantizers.

    ::

        p <- p (1 - lr wd);  m <- m + (1 - b1)(g - m);  v <- b2 v + (1 - b2) g^2
        p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

    with the fresh float32 m and v; they are rounded after the step, so the first step is the 32-bit one. With
    ``state="state8"`` a parameter has 2 bytes of state, and a float32 per 256 elements and state (bitsandbytes'
    ``AdamW8bit``); with ``state=None`` 8 bytes, and every step equals ``torch.optim.AdamW(foreach=False)`` bit for bit
    on float32 parameters.

    Differs from bitsandbytes' CUDA kernel: the decay comes before the update, as in the paper, torch and their 32-bit
    kernel; codes are the nearest ones, also where that turns a small first moment into 0.

    Args:
        params: parameters, named parameters or groups, as torch takes them; or a module, whose embeddings then keep
            32-bit states (:func:`~nybble.optim.split_embeddings`).
        lr, betas, eps, weight_decay: :class:`AdamWOptions`; a group may have its own.
        common: ``state``, ``min_size``, ``seed``, ``weights``, ``keep_sign`` (:class:`~nybble.optim._common.Common`).
            The moments are ``exp_avg`` (both signs) and ``exp_avg_sq`` (never negative).

    >>> import torch
    >>> layer = torch.nn.Linear(256, 64)
    >>> optimizer = AdamW(layer.parameters(), lr=1e-2)
    >>> layer(torch.ones(1, 256)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.state_bytes()  # the weight: 16,384 codes and 64 scales; the bias: 64 float32
    {'exp_avg': 16896, 'exp_avg_sq': 16896, 'step': 8}
    """

    states: ClassVar[dict[str, Kind]] = {"exp_avg": "signed", "exp_avg_sq": "nonnegative"}
    options_type: ClassVar[type[Any]] = AdamWOptions

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **common: Unpack[Common],
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options, **common)

    @staticmethod
    def update(  # noqa: D102
        p: Tensor, grad: Tensor, states: dict[str, Tensor], step: int, options: AdamWOptions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return adam_step(shrunk(p, options.lr, options.weight_decay), grad, states, step, options)


PART = AdamW
