"""Orthogonal matrices that a gradient moves: torch's own maps, a known optimum, and that they stay orthogonal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.core.orthogonal import head_rotations, rotation
from nybble.core.stiefel import CayleyDescent, block_diagonal, orthogonality_error, turned


def skew(count: int, size: int, norm: float, seed: int = 0) -> Tensor:
    a = torch.randn(count, size, size, generator=torch.Generator().manual_seed(seed))
    a = a - a.mT
    return a / a.square().sum((-2, -1), keepdim=True).sqrt() * norm


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_is_torchs_cayley_map_of_adams_direction(momentum: float) -> None:
    """R' = cayley(-a A) R by torch's own parametrization; A from torch's weighted means, one second moment a matrix."""
    start = rotation(8, "orthogonal", 0, True, 0).double()
    leaf = start.float()[None].clone().requires_grad_(True)
    descent, exact, turns = CayleyDescent([leaf], momentum), leaf.detach()[0].double(), list[Tensor]()
    for seed in range(3):
        gradient = 0.05 * torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
        leaf.grad = gradient[None].clone()
        descent.step(0.3)
        assert leaf.grad is None
        turns.append(gradient.double() @ exact.T - exact @ gradient.double().T)
        ages = torch.arange(len(turns) - 1, -1, -1, dtype=torch.float64)
        shares, others = (decay**ages / (decay**ages).sum() for decay in (torch.tensor(momentum).double(), 0.99))
        mean = (shares[:, None, None] * torch.stack(turns)).sum(0)
        size = (others * torch.stack([turn.norm() ** 2 for turn in turns])).sum().sqrt()
        w = mean * 8**0.5 / size
        layer = torch.nn.Linear(8, 8, bias=False, dtype=torch.float64)
        mapped = torch.nn.utils.parametrizations.orthogonal(layer, orthogonal_map="cayley", use_trivialization=False)
        mapped.parametrizations.weight.original.data = (-0.3 * w).tril()  # it takes the lower half of X, and X - X^T
        exact = mapped.weight.detach() @ exact
        torch.testing.assert_close(leaf.detach()[0].double(), exact, rtol=0, atol=1e-6)


def test_the_descent_finds_a_rotation_and_stays_orthogonal() -> None:
    """Of X to X Q: the nearest rotation is Q. Every matrix of a stack by itself; 300 steps, and still orthogonal."""
    wanted = torch.stack([turned(a) for a in skew(3, 16, 2.0)])
    x = torch.randn(3, 64, 16, generator=torch.Generator().manual_seed(1))
    leaf = torch.eye(16).repeat(3, 1, 1).requires_grad_(True)
    descent = CayleyDescent([leaf])
    for step in range(300):
        (x @ leaf - x @ wanted).square().mean().backward()  # type: ignore[no-untyped-call]
        descent.step(0.2 * (1 - step / 300))
    assert orthogonality_error(leaf) < 1e-6
    torch.testing.assert_close(leaf.detach(), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_a_step_is_an_angle_whatever_the_gradients_length(scale: float) -> None:
    """Of a channel, root mean square: ``rate`` where gradients agree, a share of it where each has its own way."""

    def moved(agree: bool) -> float:
        leaf, channels = torch.eye(64)[None].clone().requires_grad_(True), 64
        descent = CayleyDescent([leaf])
        for seed in range(20):
            leaf.grad = scale * torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0 if agree else seed))
            was = leaf.detach().clone()
            descent.step(1e-3)
        found: float = (leaf.detach() - was).square().sum().sqrt().item() / channels**0.5
        return found

    assert moved(True) == pytest.approx(1e-3, rel=0.05)
    assert moved(False) < 0.4e-3


@pytest.mark.parametrize("norm", [0.0, 0.3, 5.0, 100.0])
@pytest.mark.parametrize("size", [2, 8, 64, 128])
def test_the_map_is_the_polar_factor(size: int, norm: float) -> None:
    """Of I + A, by torch's singular vectors in float64; orthogonal to float32's last digits."""
    a = skew(2, size, norm) if norm else torch.zeros(2, size, size)
    found = turned(a)
    u, _, v = torch.linalg.svd(torch.eye(size, dtype=torch.float64) + a.double())
    torch.testing.assert_close(found.double(), u @ v, rtol=0, atol=2e-6)
    assert orthogonality_error(found) < 2e-6


def test_the_map_has_gradients() -> None:
    a = skew(1, 4, 0.7).double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda free: turned(free - free.mT), (a,))


def test_blocks_along_a_diagonal() -> None:
    parts = torch.randn(2, 3, 4, 4)
    found = block_diagonal(parts)
    assert torch.equal(found[1], torch.block_diag(*parts[1]))  # type: ignore[no-untyped-call]
    assert torch.equal(block_diagonal(parts[0]), found[0])


def test_rotations_of_heads() -> None:
    found = head_rotations(3, 24, 0, True, 0)
    torch.testing.assert_close(found @ found.mT, torch.eye(24).expand(3, 24, 24), rtol=0, atol=1e-6)
    assert not torch.equal(found[0], found[1])  # signs of their own
    plain = head_rotations(3, 24, 4, False, 0)
    assert torch.equal((plain[0] != 0).float(), torch.kron(torch.eye(6), torch.ones(4, 4)))
