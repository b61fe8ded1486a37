"""FPQ for diffusion models (arXiv:2408.06995): the search against brute force, which tails get which format."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.diffusion import inputs, save_pipeline
from tests.tiny import shortened
from torch import Tensor

import nybble
from nybble.core.errors import DataError, SchemeError
from nybble.pipelines.request import build_recipe
from nybble.quantizer import Quantizer
from nybble.solvers import Stats, Weight
from nybble.solvers.float_search import FloatSearch, encodings

FP4, FP8 = "float4_e2m1fn tensor", "e4m3_finite tensor"


def sheets(x: np.ndarray[Any, Any], e: int, m: int, c: float) -> np.ndarray[Any, Any]:
    """The sheet's Q(x) with a real bias, float64."""
    b = 2.0**e - math.log2(c) + math.log2(2 - 2.0**-m) - 1
    clipped = np.clip(x, -c, c)
    with np.errstate(divide="ignore"):
        power = np.maximum(np.floor(np.log2(np.abs(clipped)) + b), 1)
    step = 2.0 ** (power - m - b)
    found: np.ndarray[Any, Any] = np.round(clipped / step) * step
    return found


def drawn(name: str, count: int = 20_000) -> Tensor:
    rng = np.random.default_rng(0)
    makers: dict[str, Any] = {
        "normal": lambda: rng.normal(size=count),
        "laplace": lambda: rng.laplace(size=count),
        "student": lambda: rng.standard_t(3, count),
        "outliers": lambda: np.concatenate([rng.normal(size=count - 2), [3e3, -3e3]]),  # within E4M3's 2^17
        "far": lambda: np.concatenate([rng.normal(size=count - 2), [3e5, -3e5]]),
    }
    return torch.from_numpy(makers[name]()).float().reshape(1, -1)


@pytest.mark.parametrize(("line", "splits"), [(FP4, [(1, 2), (2, 1)]), (FP8, [(2, 5), (3, 4), (4, 3), (5, 2)])])
def test_the_search_is_the_exhaustive_minimum(line: str, splits: list[tuple[int, int]]) -> None:
    x = drawn("student", 1000)
    values = x.double().numpy()
    largest = np.abs(values).max()
    tried = {
        (e, m, share): float(((sheets(values, e, m, share * largest) - values) ** 2).sum())
        for e, m in splits
        for share in np.linspace(0.1, 1.2, 111)
    }
    e, m, share = min(tried, key=lambda key: tried[key])
    found, _, fraction = FloatSearch().search(x, Quantizer(line))
    assert (found.format.e, found.format.m) == (e, m)  # type: ignore[attr-defined]
    assert float(fraction) == pytest.approx(share, abs=1e-5)
    assert [len(set(fmt.grid)) for fmt in encodings(Quantizer(line).format)] == [2**found.format.bits - 1] * len(splits)


@pytest.mark.parametrize(
    ("tails", "name", "error"),
    [
        ("normal", "e2m5", 5e-5),
        ("laplace", "e2m5", 1.1e-4),
        ("student", "e3m4", 1.6e-4),
        ("outliers", "e4m3", None),
        ("far", "e5m2", None),
    ],
)
def test_the_encoding_follows_the_tails(tails: str, name: str, error: float | None) -> None:
    x = drawn(tails)
    found, params, _ = FloatSearch().search(x, Quantizer(FP8))
    assert name in found.format.name
    lost = float((found.fake_quantize(x, params) - x).square().sum() / x.square().sum())
    assert error is None or lost == pytest.approx(error, rel=0.35)


def test_better_than_min_max_of_any_encoding() -> None:
    for tails in ("normal", "student", "outliers"):
        x = drawn(tails)
        found, params, _ = FloatSearch().search(x, Quantizer(FP4))
        least = float((found.fake_quantize(x, params) - x).square().sum())
        plain = [
            float((Quantizer(f"{fmt.name} tensor").fake_quantize(x) - x).square().sum())
            for fmt in encodings(found.format)
        ]
        assert least <= min(plain)
        assert tails != "student" or least < 0.75 * plain[1]


def test_zeros_and_bad_input() -> None:
    found, params, _ = FloatSearch().search(torch.zeros(4, 8), Quantizer(FP4))
    assert torch.equal(found.fake_quantize(torch.zeros(4, 8), params), torch.zeros(4, 8))
    weight = Weight(name="w", matrix=torch.randn(4, 8), quantizer=Quantizer(FP4))
    static = Quantizer(f"{FP8} static")
    with pytest.raises(DataError, match="no calibration input reached w"):
        FloatSearch().solve([weight], Stats(quantizer=static))
    with pytest.raises(DataError, match="NaN or Inf"):
        FloatSearch().solve([weight], Stats(quantizer=static, inputs=torch.full((3, 8), float("nan"))))
    bad: list[dict[str, Any]] = [{"grid": 0}, {"low": 0.0}, {"low": 2.0}]
    for options in bad:
        with pytest.raises(SchemeError, match="low < high"):
            FloatSearch(**options)


def test_integers_get_the_same_search_of_ranges() -> None:
    """INT4 / INT8 baselines: one format, its range by the same grid; E3M0 competes where it is asked to."""
    x = drawn("student")
    found, params, fraction = FloatSearch().search(x, Quantizer("int4 tensor"))
    tried = [
        (x / s).round().clamp(-7, 7) * s
        for s in (x.abs().max() * k / 7 for k in torch.linspace(0.1, 1.2, 111).tolist())
    ]
    least = min(float((made - x).square().sum()) for made in tried)
    assert found == Quantizer("int4 tensor")
    assert float((found.fake_quantize(x, params) - x).square().sum()) == pytest.approx(least, rel=1e-4)
    assert [fmt.name for fmt in encodings(Quantizer(FP4).format, wide=True)][-1] == "float4_e3m0_finite"


def test_the_recipe_on_a_unet(tmp_path: Any) -> None:
    """Every weight one of its two neighbours, learned unit by unit; the folder is the model in memory, bit for bit."""
    folder = save_pipeline(tmp_path / "p", "unet")
    given = inputs("unet", 4)
    settings = {"batch": 2, "dtype": "float32"}
    recipe = shortened(build_recipe("fpq", effort="quick"))
    search = replace(recipe.steps[0], options={"grid": 5, "tokens": 64})
    recipe = replace(recipe, steps=(search, *recipe.steps[1:]))
    model, report = nybble.quantize(folder, recipe, given, settings=settings)
    windows = {row.learned["windows"][0]["window"] for row in report.layers if row.learned}
    assert {window.rpartition(".")[0].rpartition("/")[2] for window in windows} >= {"down_blocks.0.resnets"}
    for row in report.layers:
        layer = model.get_submodule(row.name)
        quantizer = Quantizer(str(row.weights))
        assert quantizer.format.bits == 4
        assert Quantizer(str(row.inputs)).format.bits == 8
        grid = torch.tensor(sorted(quantizer.format.grid)) * layer.weight.qtensor().tensors()["scale"].reshape(1)
        assert bool((layer.weight.qtensor().dequantize().reshape(-1, 1) - grid).abs().min(1).values.max() < 1e-6)
    nybble.quantize(folder, recipe, given, settings=settings, out=tmp_path / "out")
    again, _ = nybble.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(**given).logits, again(**given).logits)
