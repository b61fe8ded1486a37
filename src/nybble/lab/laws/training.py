"""The loss of training in a floating-point format: the law of Sun et al. 2025 (arXiv:2501.02423), and what follows.

    L = n / N^alpha + d / D^beta + eps + rho
    rho = D^beta / N^alpha * log2(B) / (gamma * (E + 0.5)^delta * (M + 0.5)^nu)

N: weights of the transformer's linear layers, without embeddings. D: tokens. E, M: exponent and mantissa bits. B:
elements that share a scale. The law is one of weights and of the inputs of the weight gradient's product (P2, P4, P6 of
the paper); it says nothing of rounded activations in the forward product, nor of rounded gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nybble.core.errors import UsageError

Block = int | str
"""Elements that share a scale, or ``channel``, or ``tensor``."""
COST = 6 / 16
"""FLOPs of a weight, a token and a bit: 6 at 16 bits."""
_MOST = 64
"""Exponent or mantissa bits that a format may have here."""


@dataclass(frozen=True, kw_only=True)
class TrainingLaw:
    """The law with its eight constants.

    Attributes:
        n, alpha, d, beta, eps: of training in high precision. gamma, delta, nu: of the format's penalty.
        channel: log2 of the block that one scale a channel is as good as.
        tensor: omega, xi, eta of ``log2 B = N^omega / (xi D^eta)``, one scale a tensor; unpublished.
    """

    n: float
    alpha: float
    d: float
    beta: float
    eps: float
    gamma: float
    delta: float
    nu: float
    channel: float = 13.1567
    tensor: tuple[float, float, float] | None = None

    def loss(self, N: float, D: float, exponent: int | None = None, mantissa: int | None = None,
             block: Block = 128) -> float:  # fmt: skip
        """Validation loss in nats a token; without a format, of bfloat16.

        Raises:
            UsageError: a size or a format that can't be.
        """
        _positive(N=N, D=D)
        plain = float(self.n / N**self.alpha + self.d / D**self.beta + self.eps)
        if exponent is None or mantissa is None:
            return plain
        return plain + self.penalty(N, D, exponent, mantissa, block)

    def penalty(self, N: float, D: float, exponent: int, mantissa: int, block: Block = 128) -> float:
        """What the format adds to the loss, in nats a token: rho."""
        _positive(N=N, D=D)
        share = float(D**self.beta / N**self.alpha)
        return share * self.log2_block(block, N, D) / self._fineness(exponent, mantissa)

    def log2_block(self, block: Block, N: float = math.nan, D: float = math.nan) -> float:
        """log2 of the elements that share a scale, or what stands for it."""
        if block == "channel":
            return self.channel
        if block == "tensor":
            if self.tensor is None:
                raise UsageError("block tensor: its constants are unpublished; give them, or a number, or channel.")
            omega, xi, eta = self.tensor
            return float(N**omega / (xi * D**eta))
        if not _is_whole(block, 1):
            raise UsageError(f"a block is a number of elements from 1 on, channel, or tensor; got {block!r}.")
        return math.log2(int(block))

    def _fineness(self, exponent: int, mantissa: int) -> float:
        for name, value in (("exponent", exponent), ("mantissa", mantissa)):
            if not _is_whole(value, 0, _MOST):
                raise UsageError(f"{name} bits are a whole number from 0 to {_MOST}; got {value!r}.")
        return float(self.gamma * (exponent + 0.5) ** self.delta * (mantissa + 0.5) ** self.nu)

    # -------------------------------------------------------------------------------------------------- closed forms

    @property
    def gamma_rho(self) -> float:
        """Of the penalty under the best layout: ``D^beta / N^alpha * log2 B / (gamma_rho * P^(delta + nu))``."""
        both = self.delta + self.nu
        return float(self.gamma * self.delta**self.delta * self.nu**self.nu / both**both)

    @property
    def gamma_data(self) -> float:
        """``gamma_D`` of the best width at fixed data."""
        both = self.delta + self.nu
        return (both - self.alpha) / (self.n * self.alpha * self.gamma_rho)

    def layouts(self, bits: int) -> list[tuple[int, int]]:
        """Exponent and mantissa bits of all formats of so many bits, a sign among them; the least penalty first."""
        if not _is_whole(bits, 1, _MOST):
            raise UsageError(f"a format has 1 to {_MOST} bits, its sign among them; got {bits!r}.")
        every = [(exponent, bits - 1 - exponent) for exponent in range(bits)]
        return sorted(every, key=lambda pair: -self._fineness(*pair))

    def best_layout(self, bits: int) -> tuple[int, int]:
        """Exponent and mantissa bits of the format of so many bits that loses least."""
        return self.layouts(bits)[0]

    def critical_data(self, N: float, exponent: int, mantissa: int, block: Block = 128) -> float:
        """Tokens past which more of them raise the loss; infinite where nothing is lost (a block of 1)."""
        _positive(N=N)
        if block == "tensor":
            raise UsageError("block tensor: its scale depends on the data, and no closed form is known.")
        cost = self.log2_block(block, N)
        if cost == 0:
            return math.inf
        return float((self.d * N**self.alpha * self._fineness(exponent, mantissa) / cost) ** (1 / (2 * self.beta)))

    def effective_size(self, N: float, D: float, bits: float, block: Block = 128) -> float:
        """Weights of the bfloat16 model of the same loss, for the best layout of so many bits (a fraction too)."""
        _positive(N=N, D=D, bits=bits)
        share = D**self.beta * self.log2_block(block, N, D) / (self.gamma_rho * self.n * bits ** (self.delta + self.nu))
        return float(N * (1 + share) ** (-1 / self.alpha))

    def bits_for_data(self, D: float, block: Block = 128) -> float:
        """The width of best loss for its compute, at fixed data: it doesn't depend on the compute."""
        _positive(D=D)
        return float((self.gamma_data * D**self.beta * self._closed(block)) ** (1 / (self.delta + self.nu)))

    def bits_for_size(self, N: float, compute: float, block: Block = 128, cost: float = COST) -> float:
        """The width of best loss for a compute of ``cost * bits * N * D`` FLOPs, at fixed size."""
        _positive(N=N, compute=compute, cost=cost)
        both = self.delta + self.nu
        gamma = (self.beta + both) / (self.d * self.beta * self.gamma_rho)
        scale = (compute / cost) ** (2 * self.beta) * N ** -(self.alpha + 2 * self.beta)
        return float((gamma * scale * self._closed(block)) ** (1 / (both + 2 * self.beta)))

    def best_of_compute(self, compute: float, block: Block = 128, cost: float = COST) -> tuple[float, float, float]:
        """Bits, weights and tokens of the least loss for a compute, all three free."""
        _positive(compute=compute, cost=cost)
        both, share = self.delta + self.nu, (self.alpha + self.beta) / self.beta
        factor = self.beta * self.d / (self.alpha * self.n) * (both - self.alpha) / (both + self.beta)
        closed = factor * (self.gamma_data * self._closed(block)) ** share * (compute / cost) ** self.alpha
        bits = float(closed ** (1 / (both * share + self.alpha)))
        tokens = float((bits**both / (self.gamma_data * self._closed(block))) ** (1 / self.beta))
        return bits, compute / (cost * bits * tokens), tokens

    def _closed(self, block: Block) -> float:
        """log2 of a block for a closed form, which wants one that costs something and hangs on neither N nor D."""
        if block == "tensor":
            raise UsageError("block tensor: its scale depends on the data, and no closed form is known.")
        found = self.log2_block(block)
        if found == 0:
            raise UsageError("a block of 1 loses nothing in any format by this law: every width is as good.")
        return found


PUBLISHED = TrainingLaw(
    n=69.2343, alpha=0.2368, d=68973.0621, beta=0.5162, eps=1.9061, gamma=11334.5197, delta=3.1926, nu=2.9543
)
"""Table 2 of the paper: LLaMA-like models of 41M to 679M weights, 10 to 100 billion tokens of Dolma."""


def _is_whole(value: Any, least: int, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _positive(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise UsageError(f"{name} is a number above 0; got {value!r}.")
