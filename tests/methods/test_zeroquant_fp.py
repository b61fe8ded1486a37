"""ZeroQuant-FP, what its sheet says that it must show (the exact cast by itself: tests/parts/test_casting.py)."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from tests.tiny import logits, save_text, save_tiny
from torch import Tensor

import nybble
from nybble.checkpoint.account import inspect
from nybble.core.errors import GranularityError, NybbleError, SchemeError, UsageError
from nybble.ops.rounding import decode
from nybble.pipelines.request import build_recipe
from nybble.qtensor import dense
from nybble.qtensor.block import BlockQTensor
from nybble.qtensor.low_rank_sum import LowRankSum
from nybble.quantizer import Quantizer
from nybble.recipe import load_recipe, parse_recipe
from nybble.scales import parse_scale_rule
from nybble.solvers import Stats, Weight
from nybble.solvers.gptq import Gptq

M2 = "float4_e2m1fn group=64 scale=pow2-ratio(mode={}) scale_format=(ufloat3_e3m0_finite channel floor=normal)"


def weights() -> Tensor:
    """float32 [64, 1024], Student's t with five degrees of freedom, rows and groups of different sizes."""
    torch.manual_seed(0)
    x = torch.distributions.StudentT(torch.tensor(5.0)).sample((64, 1024))
    return x * torch.exp2(torch.randn(64, 1)) * torch.exp2(torch.randn(64, 16).repeat_interleave(64, 1))


def scales(found: BlockQTensor) -> Tensor:
    """float64 [64, 16]."""
    assert isinstance(found.params.scale, Tensor | BlockQTensor)
    return dense(found.params.scale).double().view(64, 16)


def real(x: Tensor) -> Tensor:
    return x.view(64, 16, 64).abs().amax(-1).div(6).double()


def test_m1_is_the_next_power_of_two() -> None:
    x = weights()
    found, s = scales(Quantizer("fp4-m1").quantize(x)), real(x)
    assert torch.equal(found.log2(), found.log2().round())
    assert (found >= s).all() and (found < 2 * s).all()


@pytest.mark.parametrize("mode", ["down", "up", "nearest"])
def test_m2_is_the_formula(mode: str) -> None:
    """S_max stays, and all others are S_max / 2^k with k = ceil, floor or round of log2(S_max / S_i), at most 6."""
    x = weights()
    x[3, :64] /= 2.0**9  # further below the row's largest than three bits can say
    found, s = scales(Quantizer(M2.format(mode)).quantize(x)), real(x)
    largest = s.amax(1, keepdim=True)
    ratio = (largest / s).log2()
    k = {"down": ratio.ceil(), "up": ratio.floor(), "nearest": ratio.round()}[mode]
    assert k[3, 0] > 6 and (k[:3] <= 6).all()
    assert torch.equal(found, largest / torch.exp2(k.clamp(max=6)))
    if mode == "nearest":  # the preset's
        assert torch.equal(found, scales(Quantizer("fp4-m2").quantize(x)))
    if mode == "down":  # as published
        inside = k <= 6
        assert (found <= s)[inside].all() and (2 * found > s)[inside].all()


@pytest.mark.parametrize("weighed", [False, True])
def test_the_rows_number_and_the_powers_are_those_that_lose_least(weighed: bool) -> None:
    """Beside all 8 numbers and all 7 powers of each, tried one by one in float64, with values from ml_dtypes' table."""
    x = weights()[:16]
    weight = torch.rand(1, 1024, generator=torch.Generator().manual_seed(1)) ** 2 if weighed else torch.ones(1, 1024)
    line = Quantizer(M2.format("search,phases=8"))
    assert line.scale.weighs and not Quantizer(M2.format("nearest")).scale.weighs
    values = torch.tensor(np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64))
    blocks, importance = x.double().view(16, 16, 64), weight.double().view(1, 16, 64)
    numbers = blocks.abs().amax((1, 2), keepdim=True) / 6 * torch.exp2(torch.arange(8) / 8)  # [rows, 1, numbers]
    lost = torch.empty(8, 7, 16, 16, dtype=torch.float64)
    for i, k in itertools.product(range(8), range(7)):
        scale = numbers[..., i, None] / 2**k
        error = (blocks[..., None] / scale[..., None] - values).abs().amin(-1) * scale
        lost[i, k] = (error.square() * importance).sum(-1)
    least = lost.amin(1).sum(-1)  # [numbers, rows]
    found = line.quantize(x, line.fit(x, weight))
    own = dense_scale(found).double().view(16, 16)
    phase = (own / numbers[..., 0]).log2().mul(8).round() % 8
    assert torch.equal(phase, least.argmin(0)[:, None].expand(16, 16).double())
    errors = ((found.dequantize() - x).double().view(16, 16, 64).square() * importance).sum((1, 2))
    torch.testing.assert_close(errors, least.amin(0), rtol=1e-5, atol=0)
    assert len(set(least.argmin(0).tolist())) > 4 and (least.amin(0) < 0.97 * least[0]).any()


def over_the_rows_scale(line: str, x: Tensor) -> Tensor:
    """float64 [64, 16, 64]: what FP8 units would read; times the row's largest scale it is what is stored."""
    found = Quantizer(line).quantize(x)
    largest, own = scales(found).amax(1, keepdim=True), scales(found)
    read: Tensor = decode(found.unpacked(), "float4_e2m1fn").double().view(64, 16, 64) * (own / largest)[..., None]
    torch.testing.assert_close((read.view(64, 1024) * largest).float(), found.dequantize(), rtol=1e-6, atol=0)
    return read


@pytest.mark.parametrize("line", ["fp4-m2", *(M2.format(mode) for mode in ("up", "nearest", "search,phases=8"))])
def test_every_value_over_the_rows_scale_is_an_fp8_value(line: str) -> None:
    x = weights()
    read, plain = over_the_rows_scale(line, x), over_the_rows_scale("float4_e2m1fn group=64", x)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        assert torch.equal(read.float().to(dtype).double(), read)
        assert not torch.equal(plain.float().to(dtype).double(), plain)
        name = str(dtype).removeprefix("torch.")
        assert torch.equal(Quantizer(line).quantize(x).cast(name).unpacked().view(dtype).double(), read.view(64, 1024))


def test_m1_is_fp8_over_the_rows_largest_too() -> None:
    x = weights()
    found = scales(Quantizer("fp4-m1").quantize(x))
    near = (found.amax(1, keepdim=True) / found).log2() <= 8
    read = over_the_rows_scale("fp4-m1", x)[near]
    assert near.float().mean() > 0.9 and torch.equal(read.float().to(torch.float8_e4m3fn).double(), read)


def test_real_scales_lose_least_and_m2_less_than_m1() -> None:
    """The sheet's own calculation: 0.0182 real, 0.0320 M1, M2 0.0270 down, 0.0235 up, 0.0205 nearest."""
    torch.manual_seed(0)
    x = torch.distributions.StudentT(torch.tensor(5.0)).sample((512, 2048))
    m1 = "fp4-m1 group=256 scale=pow2(mode={})"
    lines: dict[str, str | Quantizer] = {
        "real": "float4_e2m1fn group=256 scale_format=float32", "m1": "fp4-m1 group=256",
        "m1 nearest": m1.format("nearest"), "m1 down": m1.format("rfloor"),
        **{mode: Quantizer(M2.format(mode)).replace(group=256) for mode in ("down", "up", "nearest")},
        "search": Quantizer(M2.format("search")).replace(group=256),
        "search, 8 phases": Quantizer(M2.format("search,phases=8")).replace(group=256),
        "searched": "float4_e2m1fn group=256 scale=stored scale_format=(ufloat3_e3m0_finite channel floor=normal)",
    }  # fmt: skip
    lost = {n: float((Quantizer(q).fake_quantize(x) - x).square().sum() / x.square().sum()) for n, q in lines.items()}
    assert lost["real"] < lost["nearest"] < lost["up"] < lost["down"] < lost["m1"]
    for m2, other in (("up", "m1"), ("nearest", "m1 nearest"), ("down", "m1 down")):
        assert lost["real"] < lost[m2] < lost[other]
    assert lost["searched"] < lost["nearest"]
    assert lost["search"] == lost["searched"] and lost["search, 8 phases"] < 0.95 * lost["search"]
    paper = {"real": 0.0182, "m1": 0.0320, "m1 nearest": 0.0217, "down": 0.0270, "up": 0.0235, "nearest": 0.0205}
    for name, wanted in paper.items():
        assert lost[name] == pytest.approx(wanted, rel=0.15)  # how many scales share one, it doesn't say
    assert str(Quantizer("fp4-m2").replace(scale="pow2-ratio").scale) == "pow2-ratio"
    assert parse_scale_rule("pow2-ratio") == parse_scale_rule("pow2-ratio(mode=nearest)")  # the least of the three


def test_codes_are_of_the_constrained_scales() -> None:
    """Another scale under the codes of a real one, instead of new codes, loses several times as much."""
    torch.manual_seed(0)
    x = torch.distributions.StudentT(torch.tensor(5.0)).sample((512, 2048))
    plain = Quantizer("float4_e2m1fn group=256 scale_format=float32").quantize(x)
    for words, least in (("fp4-m1", 5), ("fp4-m2 scale=pow2-ratio(mode=down)", 3), ("fp4-m2", 2)):
        found = Quantizer(words).replace(group=256).quantize(x)
        swapped = decode(plain.unpacked(), "float4_e2m1fn").view(512, 8, 256) * dense_scale(found).view(512, 8, 1)
        lost = [(v.view(512, 2048) - x).square().sum() for v in (swapped, found.dequantize())]
        assert lost[0] > least * lost[1]


def test_refusals() -> None:
    for scale_format in ("float16", "(float8_e4m3fn channel)"):
        with pytest.raises(SchemeError, match=r"pow2-ratio.* is none\..*scale_format=\(ufloat3_e3m0_finite"):
            Quantizer(f"float4_e2m1fn group=64 scale=pow2-ratio scale_format={scale_format}")
    with pytest.raises(SchemeError, match=r"phases=8\) tries numbers .*scale=one.* leave out phases"):
        Quantizer("fp4-m2 scale=pow2-ratio(phases=8) scale_format=(ufloat3_e3m0_finite channel scale=one)")
    with pytest.raises(UsageError, match=r"phases=0\): from 1, .* to 64"):
        parse_scale_rule("pow2-ratio(phases=0)")
    with pytest.raises(UsageError, match="down, up, nearest and search"):
        parse_scale_rule("pow2-ratio(mode=ceil)")


def dense_scale(found: BlockQTensor) -> Tensor:
    assert isinstance(found.params.scale, Tensor | BlockQTensor)
    return dense(found.params.scale)


# ------------------------------------------------------------------------------------------------ formats
def test_e2m1_is_the_nearest_of_its_values() -> None:
    """Code book, ties (to the even mantissa), saturation; ml_dtypes' own rounding."""
    q = Quantizer("float4_e2m1fn scale=one")
    assert sorted({abs(v) for v in q.format.values}) == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 1e9])
    assert q.fake_quantize(ties).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 6]
    x = torch.cat([ties, -ties, torch.linspace(-8, 8, 4001), -torch.zeros(1)])
    found = q.quantize(x)
    inside = x.clamp(-6, 6)  # theirs saturates too, from 7 on
    assert np.array_equal(found.unpacked().numpy(), inside.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15)
    grid = torch.tensor(q.format.grid).float()
    least = (inside[:, None] - grid).abs().amin(1)
    assert torch.equal((found.dequantize() - inside).abs(), least)
    assert torch.equal(q.fake_quantize(found.dequantize()), found.dequantize())


def test_fp8_keeps_the_small_entries_beside_an_outlier() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 512)
    x[:, 7] = 100
    small = torch.arange(512) != 7
    lost = [(Quantizer(line).fake_quantize(x) - x)[:, small].norm() for line in ("fp8-token", "int8 token")]
    assert 5 * lost[0] < lost[1]
    x[3] = 0
    assert torch.equal(Quantizer("fp8-token").fake_quantize(x)[3], torch.zeros(512))


# ------------------------------------------------------------------------------------------------ GPTQ
CONSTRAINED = (
    "float4_e2m1fn group=16", "fp4-m1 group=16", "fp4-m2 group=16", "float4_e2m1fn group=16 scale=pow2-ratio",
    "float4_e2m1fn group=16 scale=stored scale_format=(ufloat3_e3m0_finite channel floor=normal)",
    "fp4-m2 group=16 scale=pow2-ratio(mode=search,phases=4)",
)  # fmt: skip


@pytest.mark.parametrize("line", CONSTRAINED)
def test_gptq_on_constrained_scales(line: str) -> None:
    """Less output error than rounding to nearest on correlated inputs; the same codes where inputs don't correlate."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(48, 64, generator=generator)
    x = torch.randn(512, 64, generator=generator) @ (0.3 * torch.randn(64, 64, generator=generator) + torch.eye(64))
    quantizer, solver = Quantizer(line), Gptq(clip=False, block=16)
    weight = [Weight(name="w", matrix=w, quantizer=quantizer)]
    found = solver.solve(weight, Stats(second_moment=x.T @ x / 512))[0].weight
    nearest = quantizer.quantize(w)
    assert isinstance(found, BlockQTensor)
    lost = [(x @ (q.dequantize() - w).T).square().sum() for q in (found, nearest)]
    assert lost[0] < 0.8 * lost[1]
    assert torch.equal(dense_scale(found), dense_scale(nearest))  # all fixed before the first column
    if "fp4" in line or "ufloat3" in line:
        assert torch.equal(found.cast("float8_e4m3fn").dequantize(), found.dequantize())
    diagonal = torch.diag(torch.rand(64, generator=generator) + 0.1)
    found = solver.solve(weight, Stats(second_moment=diagonal))[0].weight
    assert isinstance(found, BlockQTensor) and torch.equal(found.codes, nearest.codes)


# ------------------------------------------------------------------------------------------------ the recipe
SETTINGS = nybble.Settings(samples=4, seq_len=12, batch=2, dtype=torch.float32)


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path]:
    return save_tiny(tmp_path / "float", dtype=torch.float32), save_text(tmp_path / "text.txt")


def recipe(**options: Any) -> Any:
    made = load_recipe("zeroquant-fp")
    line = str(made.scheme.rules[0].weights).replace("group=64", "group=16")
    return build_recipe("zeroquant-fp", **{"weights": line, "activations": "fp8-token", **options})


def test_the_recipe_is_the_papers() -> None:
    made = load_recipe("zeroquant-fp")
    rule = made.scheme.rules[0]
    assert rule.weights is not None and rule.weights.format.name == "float4_e2m1fn"
    assert str(rule.inputs) == "float8_e4m3fn token" and "ufloat3_e3m0_finite" in str(rule.weights.scale_format)
    steps = [(step.kind, step.name) for step in made.steps]
    assert steps[1:3] == [("solver", "gptq"), ("correction", "low-rank")] and made.steps[2].options["rank"] == 8


def test_a_file_holds_codes_shifts_one_number_a_row_and_factors(place: tuple[Path, Path], tmp_path: Path) -> None:
    """Bit for bit what is in memory; ``inspect`` counts 4 bits and what scales and factors really take."""
    out, report = nybble.quantize(str(place[0]), recipe(), str(place[1]), out=tmp_path / "out", settings=SETTINGS)
    memory, _ = nybble.quantize(str(place[0]), recipe(), str(place[1]), settings=SETTINGS)
    loaded, exact = nybble.load(out, dtype=torch.float32)[0], nybble.load(place[0], dtype=torch.float32)[0]
    assert torch.equal(logits(loaded), logits(memory))
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        held, read = (m.model.layers[1].get_submodule(name).weight.qtensor() for m in (memory, loaded))
        assert isinstance(read, LowRankSum) and isinstance(read.base, BlockQTensor)
        assert {k: v.tolist() for k, v in read.tensors().items()} == {k: v.tolist() for k, v in held.tensors().items()}
        shifts = read.base.params.scale
        assert isinstance(shifts, BlockQTensor) and shifts.format.bits == 3 and shifts.unpacked().min() >= 1
        assert isinstance(shifts.params.scale, Tensor) and shifts.params.scale.shape == (read.shape[0], 1)
        assert torch.equal(read.base.cast("float8_e4m3fn").dequantize(), read.base.dequantize())
        # of the final codes' error, the tail of its singular values is left (factors have 16 bits here)
        truth = exact.model.layers[1].get_submodule(name).weight.detach()
        values = torch.linalg.svdvals((truth - read.base.dequantize()).double())
        left = (truth - read.dequantize()).double().square().sum()
        torch.testing.assert_close(left, values[8:].square().sum(), rtol=1e-4, atol=1e-9)
    rows, columns = 32, 48
    stored = 4 * rows * columns + 3 * rows * columns // 16 + 32 * rows + 16 * 8 * (rows + columns)
    module = inspect(out)["modules"]["model.layers.1.mlp.down_proj.weight"]
    assert module["bits"] == pytest.approx(stored / (rows * columns))
    row = next(row for row in report.layers if row.name.endswith("layers.1.mlp.down_proj"))
    assert row.bits == pytest.approx(module["bits"]) and "rank 8" in str(row.weights)
    assert json.loads((Path(out) / "nybble.json").read_text())["layers"]


def mean_error(report: Any) -> float:
    return float(np.mean([row.error for row in report.layers]))


def test_each_step_of_the_recipe_is_worth_it(place: tuple[Path, Path]) -> None:
    """Relative output error, its mean over the layers: each of GPTQ and LoRC lowers it, with the other and without."""
    scheme = {"weights": str(recipe().scheme.rules[0].weights), "inputs": "fp8-token"}

    def error(*steps: dict[str, Any]) -> float:
        made = parse_recipe({"name": "x", "scheme": scheme, "steps": list(steps)})
        return mean_error(nybble.quantize(str(place[0]), made, str(place[1]), settings=SETTINGS)[1])

    nearest, gptq, lorc = {"solver": "rtn"}, {"solver": "gptq"}, {"correction": "low-rank", "rank": 8}
    whole = mean_error(nybble.quantize(str(place[0]), recipe(), str(place[1]), settings=SETTINGS)[1])
    assert whole == error(gptq, lorc)
    assert whole < 0.8 * error(nearest, lorc) < 0.8 * error(nearest)
    assert whole < 0.8 * error(gptq) < 0.8 * error(nearest)


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    "line", ["fp4-m1", "fp4-m2", "e2m1 group=64 scale=pow2-ratio(mode=up)", "int4 group=64 scale=pow2-ratio"]
)
def test_blocks_of_zeros_and_nan(line: str) -> None:
    q, x = Quantizer(line), weights()
    x[1], x[2, 64:128] = 0, 0
    found = q.quantize(x)
    assert found.dequantize().isfinite().all() and (dense_scale(found) > 0).all()
    assert (found.dequantize()[1] == 0).all() and (found.dequantize()[2, 64:128] == 0).all()
    clean = Quantizer(line).quantize(weights()).dequantize()
    assert torch.equal(found.dequantize()[3:], clean[3:])
    x[5, 3] = torch.nan
    with_nan = q.quantize(x).dequantize()
    assert with_nan[5, 3].isnan() and with_nan[6:].isfinite().all()


def test_one_scale_for_each_number_is_a_real_scale() -> None:
    """M2 of groups of one: nothing is constrained."""
    x = weights()
    alone = "scale_format=(ufloat3_e3m0_finite group=1 floor=normal)"
    for mode in ("down", "up", "nearest"):
        one = Quantizer(f"float4_e2m1fn channel scale=pow2-ratio(mode={mode})").quantize(x)
        assert torch.equal(one.dequantize(), Quantizer("float4_e2m1fn channel").fake_quantize(x))
        many = Quantizer(f"float4_e2m1fn group=64 scale=pow2-ratio(mode={mode}) {alone}").quantize(x)
        assert torch.equal(many.dequantize(), Quantizer("float4_e2m1fn group=64").fake_quantize(x))  # both in float16


def test_what_the_recipe_refuses(place: tuple[Path, Path]) -> None:
    with pytest.raises(
        GranularityError, match=r"32 columns, and group=64 does not divide them.*8, 16, 32|16, 32.*pad=true"
    ):
        nybble.quantize(str(place[0]), "zeroquant-fp", str(place[1]), settings=SETTINGS)
    steps = [{"solver": "gptq"}, {"correction": "low-rank", "rank": 17}]
    made = parse_recipe({"name": "x", "scheme": {"weights": "fp4-m2 group=16"}, "steps": steps})
    with pytest.raises(SchemeError, match="rank=17, and the weight is 16 x 32; take at most 16"):
        nybble.quantize(str(place[0]), made, str(place[1]), settings=SETTINGS)
    padded, _ = nybble.quantize(
        str(place[0]), recipe(weights="fp4-m2 group=20 pad=true"), str(place[1]), settings=SETTINGS
    )
    assert logits(padded).isfinite().all()
    broken, tokenizer = nybble.load(place[0], dtype=torch.float32)
    changed: Any = broken
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[3, 20] = torch.nan
    with pytest.raises(NybbleError, match=r"layers\.1\.mlp\.down_proj.*NaN"):
        nybble.quantize(broken, recipe(), str(place[1]), tokenizer=tokenizer, settings=SETTINGS)
