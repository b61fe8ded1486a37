"""CBQ's coarse-to-fine pre-processing: which values are outliers, and what becomes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.methods.test_omniquant import error, quantized

from nybble.core.errors import SchemeError, UsageError
from nybble.models.adapter import LinearFold, NormFold
from nybble.quantizer import Quantizer
from nybble.recipe import load_recipe
from nybble.scales.cfp import largest_reserved
from nybble.solvers import make_solver
from nybble.transforms import make_transform
from nybble.transforms._folds import Channel


def by_hand(values: np.ndarray, coarse: float, fine: float) -> float:
    """Every cut by the definition, in float64."""
    ordered = np.sort(np.abs(values.astype(np.float64)).ravel())
    q1, q3 = np.quantile(ordered, [0.25, 0.75])
    candidates = ordered[ordered > q3 + coarse * (q3 - q1)]
    below = ordered[ordered <= q3 + coarse * (q3 - q1)]
    best, found = -np.inf, np.inf
    for cut in range(len(candidates)):
        kept, outliers = candidates[:cut], candidates[cut:]
        largest = kept[-1] if cut else below[-1]
        measure = (outliers[0] - largest) ** 2 - fine * (np.var(kept) if cut else 0.0)
        if largest > 0 and measure > best:
            best, found = measure, largest
    return float(np.float32(found))


def test_a_small_tensor() -> None:
    """Quartiles 2.5 and 5.5 (of eight and four more), T = 10: candidates 11, 12, 40, 44; the gap is below 40."""
    values = torch.tensor([1.0, -2, 2.5, 3, -4, 4, 5, 5.5, 11, -12, 40, 44])
    ordered = values.abs().sort().values
    q1, q3 = np.quantile(ordered.numpy(), [0.25, 0.75])
    assert (q1, q3) == (2.875, 11.25)
    assert largest_reserved(values.abs(), 1.5, 1.0) == 12  # T = 23.8: candidates 40 and 44; 28^2 against 4^2 - 0
    assert largest_reserved(values.abs(), 0.0, 1.0) == 12  # T = 11.25: 12, 40, 44; 28^2 - 0 against 4^2 - var(12, 40)
    assert largest_reserved(values.abs(), 10.0, 1.0) == torch.inf  # T = 95: none


@pytest.mark.parametrize("fine", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("seed", range(4))
def test_cuts_by_the_definition(seed: int, fine: float) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_t(2, 2000).astype(np.float32) * 10.0 ** rng.integers(-6, 6)
    found = largest_reserved(torch.from_numpy(np.abs(values)), 1.5, fine)
    assert float(found) == by_hand(values, 1.5, fine) < np.abs(values).max()


def test_planted_outliers_are_those_five() -> None:
    """The sheet's check 6; and without candidates nothing is touched."""
    torch.manual_seed(0)
    x = torch.randn(32, 64)
    x.view(-1)[[3, 70, 500, 1111, 2000]] = torch.tensor([50.0, -50, 51, -49, 50])
    cut = largest_reserved(x.abs(), 1.5, 1.0)
    assert int((x.abs() > cut).sum()) == 5
    truncated = x.clamp(-cut, cut)
    for line in ("int4 channel", "int4 group=16", "float4_e2m1fn channel"):
        assert torch.equal(Quantizer(f"{line} scale=cfp").fake_quantize(x), Quantizer(line).fake_quantize(truncated))
    zero_point = Quantizer("int4 channel scale=cfp(asymmetric=true)")
    assert torch.equal(zero_point.fake_quantize(x), Quantizer("int4 channel symmetric=false").fake_quantize(truncated))
    even = torch.rand(32, 64)
    assert torch.equal(
        Quantizer("int4 channel scale=cfp").fake_quantize(even), Quantizer("int4 channel").fake_quantize(even)
    )
    # a constant, mostly zeros (no quartile to speak of), a single value, what isn't finite
    assert largest_reserved(torch.full((100,), 2.0), 1.5, 1.0) == torch.inf
    assert largest_reserved(torch.tensor([0.0] * 20 + [1, 1.1, 5]), 1.5, 1.0) == pytest.approx(1.1)
    assert largest_reserved(torch.tensor([0.0] * 20 + [5]), 1.5, 1.0) == torch.inf
    assert largest_reserved(torch.tensor([3.0]), 1.5, 1.0) == torch.inf
    assert largest_reserved(torch.tensor([torch.nan, torch.inf, 1, 1, 1, 1, 1.1, 9]), 1.5, 1.0) == pytest.approx(1.1)


def test_outlier_channels_alone_are_scaled() -> None:
    largest = torch.tensor([1.0, 1.2, 0.9, 1.1, 0, 1, 16.9, 1.3, 67.6, 1])
    fold = NormFold(norm="norm", readers=("a",))
    channel = Channel(fold=fold, largest=largest, before=None, behind=[torch.randn(4, 10)], rows=None)
    made: Any = make_transform("cfp", {})
    factor = made.factor(channel)
    assert made.takes(fold) and not made.takes(LinearFold(first="v", second="o"))
    assert factor.tolist() == pytest.approx([1, 1, 1, 1, 1, 1, 1, 1, 2, 1])  # sqrt(67.6 / 16.9): the larger gap
    assert factor[[0, 1, 2, 3, 4, 5, 6, 7, 9]].eq(1).all()
    two = torch.tensor([1.0, 1.2, 0.9, 1.1, 0, 1, 20.8, 1.3, 20.8, 1])
    factor = made.factor(Channel(fold=fold, largest=two, before=None, behind=[], rows=None))
    assert factor.tolist() == pytest.approx([1, 1, 1, 1, 1, 1, 4, 1, 4, 1])  # sqrt(20.8 / 1.3)
    with pytest.raises(UsageError, match=r"coarse=-1"):
        make_transform("cfp", {"coarse": -1.0})


def test_as_a_recipes_scale_rule_it_keeps_zero_points() -> None:
    """``rtn`` with ``scale: cfp``; a rule that finds no zero point isn't put aside in silence."""
    line = "int4 channel symmetric=false scale_format=float32"
    asked = make_solver("rtn", {"scale": "cfp"}).quantizer_for(Quantizer(line))
    assert asked == Quantizer("int4 channel scale=cfp(asymmetric=true) scale_format=float32")
    largest = make_solver("rtn", {"scale": "absmax"}).quantizer_for(Quantizer(line))
    assert largest == Quantizer(line)
    with pytest.raises(
        SchemeError, match=r"int4 channel symmetric=false.*zero point, and scale=percentile.*mse or cfp"
    ):
        make_solver("rtn", {"scale": "percentile(p=99)"}).quantizer_for(Quantizer(line))


def test_cbq_without_it_loses_more() -> None:
    """The recipe, W4A4, two loud channels in front of attention and MLP, on tokens that nothing has seen."""
    steps = [{key: value for key, value in s.items() if key != "quick"} for s in load_recipe("cbq").to_dict()["steps"]]
    whole = [{**s, "steps": 6} if "reconstruction" in s else s for s in steps if "correction" not in s]
    bare = [{key: value for key, value in s.items() if key != "scale"} for s in whole if s.get("transform") != "cfp"]
    assert len(bare) == len(whole) - 1 and {"solver": "rtn", "scale": "cfp"} in whole
    found, without = error(quantized(whole)[0]), error(quantized(bare)[0])
    assert found < 0.6 * without and found < 0.6 * error(quantized([{"solver": "rtn"}])[0])
