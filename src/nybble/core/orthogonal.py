"""Orthogonal matrices: Hadamard's, of the orders that Sylvester's and Paley's constructions give, and random ones.

Paley 1933: with q a prime and chi the quadratic character modulo q, Q_ij = chi(i - j) is antisymmetric for q = 3 mod 4,
symmetric for q = 1 mod 4, and

    q + 1     =  I + [[0, 1], [-1, Q]]                          order 12, 20, 24, 44, 60 ...
    2 (q + 1) =  C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]], C = [[0, 1], [1, Q]]       order 28, 36, 52, 76 ...
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.core.seeds import derive_seed

Matrix = Literal["hadamard", "orthogonal"]
_LARGEST = 128
"""Order of a Sylvester factor: products with smaller matrices are no faster."""


@cache
def hadamard_signs(order: int) -> np.ndarray | None:
    """A Hadamard matrix, int8 [order, order] of +-1 with H H^T = order I; None where these constructions have none."""
    if order <= 2:
        return np.array([[1, 1], [1, -1]], np.int8)[:order, :order] if order > 0 else None
    made = _paley(order)
    if made is None and order % 2 == 0:
        half = hadamard_signs(order // 2)
        made = None if half is None else np.kron(np.array([[1, 1], [1, -1]], np.int8), half)
    return made


def _paley(order: int) -> np.ndarray | None:
    """By one of Paley's constructions; powers of two are Sylvester's."""
    if order & (order - 1) == 0 or order % 4:
        return None
    found: np.ndarray | None = None
    q = order // 2 - 1
    if _prime(order - 1):
        found = np.eye(order, dtype=np.int8) + _conference(order - 1)
    elif q % 4 == 1 and _prime(q):
        found = np.kron(np.eye(q + 1, dtype=np.int8), np.array([[1, -1], [-1, -1]], np.int8))
        found += np.kron(_conference(q), np.array([[1, 1], [1, -1]], np.int8))
    return found


def _conference(q: int) -> np.ndarray:
    """int8 [q + 1, q + 1]: zeros on the diagonal, chi(i - j) inside, a border of ones, of sign chi(-1) on the left."""
    chi = np.full(q, -1, np.int8)
    chi[np.arange(1, q, dtype=np.int64) ** 2 % q] = 1
    chi[0] = 0
    found = np.zeros((q + 1, q + 1), np.int8)
    found[1:, 1:] = chi[(np.arange(q)[:, None] - np.arange(q)) % q]
    found[0, 1:], found[1:, 0] = 1, chi[-1]
    return found


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


@cache
def hadamard_factors(order: int) -> tuple[np.ndarray, ...]:
    """Small matrices whose Kronecker product is a Hadamard matrix; Sylvester's where the order is a power of two.

    Powers of two are split off before a construction of Paley's is asked for, so this may be another matrix than
    :func:`hadamard_signs`: multiplying by these one after the other takes ``n_1 + n_2 + ...`` additions an element.

    Returns:
        int8 [n_i, n_i] of +-1, the product of all n_i being ``order``.

    Raises:
        SchemeError: none of this order is known here.
    """
    base = order & -order if order > 0 else 1
    left = order // base if order > 0 else 0
    while base > 1 and left > 1 and _paley(left) is None:
        base, left = base // 2, left * 2
    last = None if left <= 1 else _paley(left)
    if order < 1 or (left > 1 and last is None):
        raise SchemeError(
            f"no Hadamard matrix of order {order} is known here (Sylvester's and Paley's constructions and their "
            "products); take a block that divides the channels and has one, such as 32."
        )
    twos = base.bit_length() - 1
    parts = -(-twos // (_LARGEST.bit_length() - 1))
    sizes = [1 << (twos // parts + (number < twos % parts)) for number in range(parts)]
    found = [hadamard_signs(size) for size in sizes or ([1] if last is None else [])]
    return tuple(each for each in (*found, last) if each is not None)


def largest_block(width: int) -> int:
    """The most neighbours of ``width`` channels that a Hadamard matrix rotates, in blocks that divide them."""
    return next(n for n in range(width, 0, -1) if width % n == 0 and hadamard_signs(n) is not None)


def hadamard(order: int) -> Tensor:
    """A Hadamard matrix over sqrt(order), float32 [order, order]; Sylvester's where the order is a power of two.

    Raises:
        SchemeError: none of this order is known here.
    """
    signs = hadamard_signs(order)
    if signs is None:
        raise SchemeError(
            f"no Hadamard matrix of order {order} is known here (Sylvester's and Paley's constructions and their "
            "products); use matrix: orthogonal, or a block that divides it, such as 32."
        )
    return torch.from_numpy(signs).float().div(order**0.5)


@lru_cache(maxsize=4)
def rotation(width: int, matrix: Matrix, block: int, signs: bool, seed: int) -> Tensor:
    """An orthogonal matrix, float32 [width, width], the same for the same arguments; not to be written to.

    Args:
        width: channels.
        matrix: which kind.
        block: channels that are rotated among themselves, a block like the other; 0 for all of them.
        signs: multiply the channels by random signs first, so that no pattern of theirs survives a Hadamard matrix.
        seed: of signs and random matrices.

    Raises:
        SchemeError: the block doesn't divide the width; there is no such Hadamard matrix.
    """
    size = block or width
    check_block("block", block, width, "that are to be rotated", matrix)
    generator = torch.Generator().manual_seed(derive_seed(seed, "rotate"))
    if matrix == "hadamard":
        part = hadamard(size)
    else:
        q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        part = (q * r.diagonal().sign()).float().contiguous()  # QR gives columns
    whole = torch.kron(torch.eye(width // size, dtype=part.dtype), part)
    if signs:
        whole = (torch.randint(0, 2, (width, 1), generator=generator) * 2 - 1) * whole
    return whole


def check_block(option: str, block: int, width: int, which: str, matrix: Matrix) -> None:
    """Refuse a block that does not divide the channels; names the nearest ones that do, and have such a matrix.

    Args:
        option: what a user calls it.
        block: channels that are rotated among themselves; 0: all.
        width: channels.
        which: of them, in words.
        matrix: of the rotation.

    Raises:
        SchemeError: it doesn't.
    """
    if not block or width % block == 0:
        return
    sizes = [
        n for n in range(2, width + 1) if width % n == 0 and (matrix != "hadamard" or hadamard_signs(n) is not None)
    ]
    near = [*[n for n in sizes if n < block][-1:], *[n for n in sizes if n > block][:1]]
    raise SchemeError(
        f"{option}={block} does not divide the {width} channels {which}; "
        + (f"the nearest that do: {', '.join(map(str, near))}." if near else f"leave {option} out.")
    )


def head_rotations(heads: int, width: int, block: int, signs: bool, seed: int, option: str = "block") -> Tensor:
    """Hadamard matrices for the channels of each head, float32 [heads, width, width], the same for the same arguments.

    Args:
        heads: how many.
        width: channels of each.
        block: channels that are rotated among themselves; 0 means the largest power of two that divides the width.
        signs: with random signs of the columns, of every head its own.
        seed: of these.
        option: what a user calls the block.

    Raises:
        SchemeError: the block doesn't divide the width.
    """
    check_block(option, block, width, "of a head", "hadamard")
    part = hadamard(block or width & -width)
    found = torch.kron(torch.eye(width // len(part), dtype=part.dtype), part).expand(heads, -1, -1)
    if signs:
        generator = torch.Generator().manual_seed(derive_seed(seed, "hadamard"))
        found = found * (torch.randint(0, 2, (heads, 1, width), generator=generator) * 2 - 1)
    return found.contiguous()
