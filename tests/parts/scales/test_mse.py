"""``mse(offset=true)``: scale and offset searched together, against all pairs of ends."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from nybble.core.errors import SchemeError, UsageError
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.recipe import load_recipe
from nybble.scales import parse_scale_rule
from nybble.solvers import Stats, Weight, make_solver

FORMATS = ("uint4", "uint2", "int3", "udybit4", "float4_e2m1fn", "nf4", "binary")


def tensors() -> dict[str, Tensor]:
    return {"off zero": torch.randn(48, 32) + 2, "one-sided": torch.randn(48, 32).exp()}


def lost(x: Tensor, low: Tensor, high: Tensor, fmt: str, weight: Tensor) -> Tensor:
    """Of rounding each row of ``x`` to a format spread over a range, by torch's own search in the list of values."""
    grid = torch.tensor(sorted(Quantizer(fmt).format.grid.tolist()), dtype=torch.float64)
    scale = ((high - low) / (grid[-1] - grid[0])).float().double()
    offset = (low - scale * grid[0]).float().double()
    values = grid[((x - offset) / scale)[..., None].sub(grid).abs().argmin(-1)]
    return ((values * scale + offset - x).square() * weight).sum(1, keepdim=True)


def brute_force(x: Tensor, fmt: str, fractions: list[float], weight: Tensor) -> Tensor:
    """The least of all pairs, float64 [rows, 1]."""
    x, least = x.double(), torch.tensor(torch.inf)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    half = (high - low) / 2
    for a, b in itertools.product(fractions, fractions):
        least = torch.minimum(least, lost(x, low + half * (1 - a), high - half * (1 - b), fmt, weight))
    return least


@pytest.mark.parametrize("fmt", FORMATS)
def test_near_the_best_of_all_pairs(fmt: str) -> None:
    fractions = [*torch.linspace(0.3, 1.2, 25).tolist(), 1.0]
    importance = torch.rand(1, 32) ** 2 + 0.01
    for what, x in tensors().items():
        for weight in (None, importance):
            counted = torch.ones(1, 32) if weight is None else weight
            best = brute_force(x, fmt, fractions, counted)
            quantizer = Quantizer(f"{fmt} channel scale=mse(low=0.3,high=1.2,grid=25,offset=true)")
            found = quantizer.fake_quantize(x, quantizer.fit(x, weight))
            error = ((found - x).square() * counted).sum(1, keepdim=True)
            assert float(error.sum()) <= 1.05 * float(best.sum()), what
            plain = Quantizer(f"{fmt} channel scale=minmax(offset=true)")
            least = ((plain.fake_quantize(x) - x).square() * counted).sum(1, keepdim=True)
            assert bool((error <= least * 1.00001).all()), f"{what}: worse than the whole range"


def test_scales_are_judged_as_stored() -> None:
    """Nested scales of few bits: the error under them is less than that of what float32 scales choose."""
    x = torch.randn(64, 128) + 1
    for rule in ("mse(offset=true)", "mse(asymmetric=true)"):
        line = f"uint3 group=16 scale={rule} offset_format=float32"
        stored = Quantizer(f"{line} scale_format=(float8_e5m2 channel)")
        as_plain = stored.harden(Quantizer(f"{line} scale_format=float32").fit(x))
        found, other = stored.fake_quantize(x), stored.fake_quantize(x, as_plain)
        assert float((found - x).square().sum()) < 0.999 * float((other - x).square().sum()), rule


@pytest.mark.parametrize("recipe", ["mse", "adaround", "awq", "cbq", "minmax-fp", "smoothquant"])
@pytest.mark.parametrize("line", ["udybit4 scale=minmax(offset=true)", "binary channel scale=mean(offset=true)"])
def test_recipes_that_set_a_rule_keep_the_offset(recipe: str, line: str) -> None:
    """The scale rule of a recipe's solver searches with the offset; no worse than the scheme's own rule."""
    step = load_recipe(recipe).solver
    solver = make_solver(step.name, step.options)
    quantizer, x = Quantizer(line), torch.randn(64, 32)
    chosen = solver.quantizer_for(quantizer)
    assert chosen.scale.has_offset and chosen.scale == parse_scale_rule(str(chosen.scale))
    weight = torch.randn(16, 32) + 0.5
    solved = solver.solve(
        [Weight(name="w", matrix=weight, quantizer=quantizer)], Stats(second_moment=x.T @ x / 64, inputs=x)
    )[0]
    assert isinstance(solved.weight, BlockQTensor) and solved.weight.params.offset is not None
    if "mse" in str(chosen.scale):
        assert solved.error <= solved.rtn_error


def test_what_finds_no_offset_is_refused() -> None:
    solver = make_solver("rtn", {"scale": "pow2"})
    with pytest.raises(SchemeError, match=r"keeps a real offset, and scale=pow2 finds none"):
        solver.quantizer_for(Quantizer("uint4 channel scale=minmax(offset=true)"))
    for rule in ("mse", "cfp"):
        with pytest.raises(UsageError, match="an integer zero point or a real offset"):
            parse_scale_rule(f"{rule}(asymmetric=true,offset=true)")


def test_cfp_truncates_around_an_offset() -> None:
    """The codes of the truncated tensor; a row beyond the cut altogether keeps its range."""
    x = torch.randn(32, 64) + 0.3
    x[3, 5], x[7, 9] = 60.0, -55.0
    cut = float(x[(x.abs() < 50)].abs().max())
    truncated = Quantizer("uint4 channel scale=minmax(offset=true)").fake_quantize(x.clamp(-cut, cut))
    quantizer = Quantizer("uint4 channel scale=cfp(offset=true)")
    assert torch.equal(quantizer.fake_quantize(x), truncated)
    beyond = torch.cat([x, torch.randn(1, 64) - 70, torch.randn(1, 64) + 70])
    assert torch.allclose(quantizer.fake_quantize(beyond)[-2:], beyond[-2:], atol=0.2)
