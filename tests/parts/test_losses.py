"""Reconstruction losses: torch's own functions, padding left out, gradients that point to the target."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nybble.core.errors import SchemeError
from nybble.recipe import load_recipe
from nybble.reconstruction import FISHER, FLOAT, LOCAL, REGISTRY, make_reconstruction

MASK = torch.tensor([[True, True, False], [True, False, False]])


def loss(name: str, output: Tensor, wanted: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    made = make_reconstruction(name, {"weights": "adaround", **options})
    weight = torch.linspace(0.5, 1.5, wanted.numel()).reshape(wanted.shape)
    given = {target: weight if target == FISHER else wanted for target in made.targets}
    found = made.loss(output, given, mask)
    assert found.dtype == torch.float32 and found.shape == ()
    return found


def torchs(name: str, output: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Of [vectors, features], float32."""
    if name == "fisher":
        root = weight.sqrt()
        return functional.mse_loss(root * output, root * wanted) / (root * wanted).square().mean()
    if name == "mse":
        return functional.mse_loss(output, wanted) / wanted.square().mean()
    if name == "cosine-log":
        return -functional.cosine_similarity(output, wanted, -1).log().mean()
    if name == "l2-kl":
        divergence = functional.kl_div(output.log_softmax(-1), wanted.softmax(-1), reduction="batchmean")
        return functional.mse_loss(output, wanted, reduction="sum") / len(output) + divergence
    assert name == "two-target"
    return 2 * torchs("mse", output, wanted, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REGISTRY.names())
def test_equals_torchs_own(name: str, dtype: torch.dtype) -> None:
    wanted = torch.randn(2, 3, 16).to(dtype)
    output = (wanted + 0.3 * torch.randn(2, 3, 16)).to(dtype)
    for mask in (None, MASK):
        weight = torch.linspace(0.5, 1.5, 96).reshape(2, 3, 16)
        rows = [t.float().reshape(-1, 16) if mask is None else t.float()[mask] for t in (output, wanted, weight)]
        torch.testing.assert_close(loss(name, output, wanted, mask), torchs(name, *rows), rtol=1e-5, atol=1e-6)
    changed = torch.where(MASK[..., None], output, 7.0)
    assert torch.equal(loss(name, changed, wanted, MASK), loss(name, output, wanted, MASK))


@pytest.mark.parametrize("name", REGISTRY.names())
def test_images_have_a_vector_a_place(name: str) -> None:
    wanted = torch.randn(2, 8, 3, 3)
    output = wanted + 0.3 * torch.randn(2, 8, 3, 3)
    weight = torch.linspace(0.5, 1.5, output.numel()).reshape(output.shape)
    rows = [t.movedim(1, -1).reshape(-1, 8) for t in (output, wanted, weight)]
    torch.testing.assert_close(loss(name, output, wanted, MASK), torchs(name, *rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", REGISTRY.names())
def test_least_at_the_target_and_finite_everywhere(name: str) -> None:
    """0 there (CBQ's check 5), without a gradient; a step against the gradient comes nearer; zeros are no NaN."""
    wanted = torch.randn(2, 3, 16)
    at = wanted.clone().requires_grad_()
    least = loss(name, at, wanted)
    least.backward()  # type: ignore[no-untyped-call]
    assert float(least.detach()) == pytest.approx(0, abs=1e-6)
    assert at.grad is not None and at.grad.abs().max() < 1e-6
    off = (wanted + 0.3 * torch.randn(2, 3, 16)).requires_grad_()
    first = loss(name, off, wanted)
    first.backward()  # type: ignore[no-untyped-call]
    assert off.grad is not None and float(first.detach()) > 0
    nearer = loss(name, off.detach() - 0.01 * off.grad / off.grad.norm(), wanted)
    assert float(nearer) < float(first.detach())
    zeros = torch.zeros(2, 3, 16, requires_grad=True)
    nothing = loss(name, zeros, torch.zeros(2, 3, 16))
    nothing.backward()  # type: ignore[no-untyped-call]
    assert float(nothing.detach()) == 0 and zeros.grad is not None and zeros.grad.isfinite().all()
    opposite = loss(name, -wanted, wanted)
    assert bool(opposite.isfinite()) and float(opposite) > 0


def test_two_targets_are_weighed_and_either_may_go() -> None:
    """CBQ's check 7, and both errors."""
    wanted, other = torch.randn(2, 2, 3, 16)
    output = torch.randn(2, 3, 16)
    both = {FLOAT: wanted, LOCAL: other}
    for error in ("mse", "l2-kl"):

        def weighed(a: float, b: float, error: str = error) -> Tensor:
            options = {"weights": "adaround", "error": error, "accumulated": a, "local": b}
            return make_reconstruction("two-target", options).loss(output, both, None)

        one, two = (loss(error, output, target) for target in (wanted, other))
        torch.testing.assert_close(weighed(1, 0), one)
        torch.testing.assert_close(weighed(0, 1), two)
        torch.testing.assert_close(weighed(0.5, 2), 0.5 * one + 2 * two)
        assert one != two
    for options, said in (
        ({"accumulated": 0.0, "local": 0.0}, "one of them is more"), ({"local": -1.0}, "0 or more"),
        ({"feed": "float"}, "use mse"),
    ):  # fmt: skip
        with pytest.raises(SchemeError, match=f"two-target.*{said}"):
            make_reconstruction("two-target", {"weights": "adaround", **options})


def test_cbqs_recipe_has_cbqs_error_on_both_targets() -> None:
    (step,) = (step for step in load_recipe("cbq").steps if step.kind == "reconstruction")
    wanted, other, output = torch.randn(3, 2, 3, 16)
    found = make_reconstruction(step.name, step.options).loss(output, {FLOAT: wanted, LOCAL: other}, None)
    torch.testing.assert_close(found, loss("l2-kl", output, wanted) + loss("l2-kl", output, other))


def test_the_angle_counts_whole_beside_the_squared_error() -> None:
    """PTQ1.61's error by torch's functions; what points the other way has the largest angle there is, not none."""
    wanted = torch.randn(2, 3, 16)
    output = wanted + 0.3 * torch.randn(2, 3, 16)
    apart, towards = (loss(name, output, wanted) for name in ("mse", "cosine-log"))
    found = loss("two-target", output, wanted, error="mse-cosine", local=0.0)
    torch.testing.assert_close(found, apart + towards)
    both: dict[str, Any] = {"error": "mse-cosine", "local": 0.0}
    for name, options in (("cosine-log", dict[str, Any]()), ("two-target", both)):
        beside = 0.0 if name == "cosine-log" else 4.0  # |-y - y|^2 / |y|^2
        assert float(loss(name, -wanted, wanted, **options)) == pytest.approx(beside - math.log(1e-4), rel=1e-5)
