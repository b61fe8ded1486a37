"""LLM-FP4 (Liu et al. 2023, arXiv:2310.16836): what a faithful implementation must show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nybble.calibration.block import BlockState, Record
from nybble.core.errors import DataError, FormatError, GranularityError, NybbleError, SchemeError
from nybble.formats import get_format
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.kinds import describe, restore, targets_of
from nybble.nn.layouts import Layouts
from nybble.nn.linear import QuantLinear
from nybble.qtensor import Factored, QuantParams, dense
from nybble.quantizer import Quantizer
from nybble.report.record import block_rows
from nybble.scheme import Rule
from nybble.solvers import Solved, Solver, Stats, Weight, make_solver
from nybble.solvers._ladder import Error, Ladder, fractions, menu
from nybble.solvers._layer_error import InputsFixed, WeightsFixed, output_error
from nybble.solvers.llm_fp4 import LlmFp4, _Choice

FP4 = ("float4_e3m0_finite", "float4_e2m1fn", "float4_e1m2_finite")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def draw(kind: str, *shape: int, seed: int = 0) -> Tensor:
    """Numbers of a distribution."""
    rng = np.random.default_rng(seed)
    if kind == "uniform":
        return torch.from_numpy(rng.uniform(-1, 1, shape)).float()
    if kind == "gaussian":
        return torch.from_numpy(rng.standard_normal(shape)).float()
    return torch.from_numpy(rng.standard_t(int(kind.removeprefix("student")), shape)).float()


def outlier_inputs(tokens: int = 512, columns: int = 64, loud: int = 4, seed: int = 1) -> Tensor:
    """Gaussian activations with a few channels 40 to 80 times as large."""
    x = draw("gaussian", tokens, columns, seed=seed)
    x[:, :loud] *= torch.linspace(40, 80, loud)
    return x


def solve(solver: Solver, matrix: Tensor, x: Tensor | None, weights: str, inputs: str | None) -> Solved:
    second = None if x is None else x.T @ x / len(x)
    stats = Stats(second_moment=second, inputs=x, quantizer=None if inputs is None else Quantizer(inputs))
    return solver.solve([Weight(name="layer", matrix=matrix, quantizer=Quantizer(weights))], stats)[0]


def layer(matrix: Tensor, found: Solved) -> QuantLinear:
    assert found.inputs is not None
    return QuantLinear(found.weight, None, ActivationQuantizer(*found.inputs))


# --------------------------------------------------------------------------------------------------- 1, 2: the grids
def test_the_three_fp4_grids() -> None:
    line = torch.linspace(-80, 80, 100_001)
    expected = {
        "float4_e1m2_finite": [0, 1, 2, 3, 4, 5, 6, 7],
        "float4_e2m1fn": [0, 1, 2, 3, 4, 6, 8, 12],
        "float4_e3m0_finite": [0, 1, 2, 4, 8, 16, 32, 64],
    }
    for name, steps in expected.items():
        fmt = get_format(name)
        scale = torch.tensor([[1 / fmt.smallest]])  # in units of the smallest step
        found = Quantizer(f"{name} tensor").fake_quantize(line[None], QuantParams(scale))
        assert sorted(set(found.flatten().tolist())) == sorted(
            {*(float(s) for s in steps), *(-float(s) for s in steps)}
        )
    x = draw("gaussian", 64, 64)
    e1m2, int4 = (Quantizer(f"{name} channel").fake_quantize(x) for name in ("e1m2", "int4"))
    assert torch.allclose(e1m2, int4, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FP4)
def test_largest_value_and_bias_agree(name: str) -> None:
    """maxval(b) = (2 - 2^-m) 2^(2^e - 1 - b): nybble's scale is 2^-b but for the format's own bias."""
    fmt = get_format(name)
    e, m = int(name[name.index("_e") + 2]), int(name[name.index("m") + 1])
    quantizer, x = Quantizer(f"{name} tensor"), draw("student5", 8, 512)
    params = quantizer.fit(x)
    top = float(dense(params.scale).item() * fmt.absmax)  # type: ignore[arg-type]
    bias = 2**e - np.log2(top) + np.log2(2 - 2.0**-m) - 1
    assert (2 - 2.0**-m) * 2.0 ** (2**e - 1 - bias) == pytest.approx(top, rel=1e-6)
    values = quantizer.fake_quantize(x, params)
    by_equation = _equation(x.double().numpy(), e, m, bias)
    assert np.abs(values.double().numpy() - by_equation).max() <= 1e-5 * top
    assert torch.equal(quantizer.fake_quantize(values, params), values)
    assert torch.equal(quantizer.fake_quantize(-x, params), -values)
    assert float(values.abs().max()) <= top * (1 + 1e-6)


def _equation(x: np.ndarray, e: int, m: int, bias: float) -> np.ndarray:
    """The paper's quantizer with a real bias, in float64."""
    top = (2 - 2.0**-m) * 2.0 ** (2**e - 1 - bias)
    clipped = np.clip(x, -top, top)
    with np.errstate(divide="ignore"):
        exponent = np.maximum(np.floor(np.log2(np.abs(clipped)) + bias), 1)
    step = 2.0 ** (exponent - m - bias)
    found: np.ndarray = np.round(clipped / step) * step
    return found


# ------------------------------------------------------------------------------------------- 3, 4: search and choice
def test_search_is_never_worse_and_better_on_heavy_tails() -> None:
    solver = make_solver("llm-fp4", {"rounds": 2, "grid": 40})
    x = outlier_inputs()
    for seed in range(4):
        matrix = draw("student5", 48, 64, seed=seed)
        for inputs in ("float4_e2m1fn tensor static", "float4_e2m1fn shifted static", "float8_e4m3fn token", None):
            found = solve(solver, matrix, x, "float4_e2m1fn channel", inputs)
            assert found.error < found.rtn_error
    matrix = draw("student5", 1, 8192)
    fixed = make_solver("llm-fp4", {"formats": False})
    found = solve(fixed, matrix, None, "float4_e2m1fn tensor", None)
    assert found.error <= 0.75 * found.rtn_error


@pytest.mark.parametrize(
    ("kind", "fmt", "mse"), [("uniform", FP4[2], 0.0045), ("gaussian", FP4[1], 0.0127), ("student3", FP4[0], 0.0385)]
)
def test_format_follows_the_distribution(kind: str, fmt: str, mse: float) -> None:
    found = solve(make_solver("llm-fp4", {}), draw(kind, 1, 65536), None, "float4_e2m1fn tensor", None)
    assert found.quantizer is not None
    assert found.quantizer.format.name == fmt
    assert found.error == pytest.approx(mse, rel=0.2)


def test_menu_of_formats() -> None:
    assert {f.name for f in menu(get_format("e2m1"))} == set(FP4)
    eight = menu(get_format("float8_e4m3fn"))
    assert eight[0].name == "float8_e4m3fn"
    assert {(f.e, f.m) for f in eight} == {(e, 7 - e) for e in range(1, 6)}  # type: ignore[attr-defined]
    assert len(menu(get_format("e3m2"))) == 5
    assert menu(get_format("int4")) == [get_format("int4")]


def test_quick_grid_is_close_to_the_full_one() -> None:
    x, matrix = outlier_inputs(), draw("student5", 48, 64)
    full, quick = (
        solve(make_solver("llm-fp4", options), matrix, x, "e2m1 channel", "e2m1 shifted static").error
        for options in ({}, {"grid": 12, "fine": 6, "rounds": 2})
    )
    assert quick <= 1.1 * full


# ------------------------------------------------------------------------------------------------------- 5: algebra
def test_shifts_move_between_input_and_weight() -> None:
    """(2^s X_q)(2^-s W_q) equals X_q W_q bit for bit, and 2^s X_q lies on the grid of rho."""
    x, w = outlier_inputs(), draw("gaussian", 16, 64)
    quantizer = Quantizer("float4_e2m1fn shifted static")
    params = quantizer.fit(x)
    assert isinstance(params.scale, Factored)
    scale, powers = (dense(f).double() for f in params.scale.factors)
    rounded = quantizer.fake_quantize(x, params).double()
    lifted = rounded / powers
    grid = (torch.from_numpy(quantizer.format.grid).float() * scale.float()).double()
    assert torch.isin(lifted, grid).all()
    weight = Quantizer("e2m1 channel").fake_quantize(w).double()
    shifted = weight * powers
    for row in range(0, 512, 64):  # products of every term are equal, so every order of their sum is
        assert torch.equal(lifted[row] * shifted, rounded[row] * weight)
    assert torch.equal(lifted @ shifted.T, rounded @ weight.T)


# ------------------------------------------------------------------------------------------------------ 6: outliers
def test_pre_shifted_lies_between_per_channel_and_per_tensor() -> None:
    x, w = outlier_inputs(1024, 768), draw("gaussian", 64, 768, seed=2)  # the quiet channels carry 5 % of the power
    power = output_error(x, None, w, torch.zeros_like(w))
    solver = make_solver("llm-fp4", {"formats": False})
    per_channel = Quantizer("e2m1 channel scale=mse(low=0.3,high=1.2)").fake_quantize(x.T.contiguous()).T
    error = {"channel": output_error(x, per_channel, w, w) / power}
    for inputs in ("tensor", "shifted"):
        found = solve(solver, w, x, "float16_e5m10 channel", f"e2m1 {inputs} static")
        assert found.inputs is not None
        error[inputs] = output_error(x, found.inputs[0].fake_quantize(x, found.inputs[1]), w, w) / power
    assert error["channel"] <= error["shifted"] <= 0.5 * error["tensor"]


# -------------------------------------------------------------------------------------------- 7: shifts in the file
def test_shifts_survive_the_file_and_give_the_same_numbers(tmp_path: Path) -> None:
    x, matrix = outlier_inputs(), draw("student5", 48, 64)
    found = solve(make_solver("llm-fp4", {"grid": 30}), matrix, x, "e2m1 channel", "e2m1 shifted static")
    made = layer(matrix, found)
    assert made.inputs is not None
    shifts = made.inputs.get_buffer("shifts")
    assert shifts.dtype == torch.uint8
    limit = 2**made.inputs.quantizer.format.e - 1  # type: ignore[attr-defined]
    assert int(shifts.min()) == 0 < int(shifts.max()) <= limit
    save_file(made.state_dict(), tmp_path / "layer.safetensors")
    layouts = Layouts()
    entry = describe(made, layouts)
    root = nn.Sequential(nn.Linear(64, 48, bias=False))
    with torch.device("meta"):
        restore(root, "0", entry, layouts)
    root[0].load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(root.to(dtype)(x.to(dtype)), made(x.to(dtype)))
    quantizer, params = found.inputs or (Quantizer("e2m1"), None)
    assert torch.equal(made(x), quantizer.fake_quantize(x, params) @ found.weight.dequantize().T)


def test_the_report_counts_the_columns_of_every_shift() -> None:
    quantizer = Quantizer("e2m1 shifted static")
    params = quantizer.fit(torch.tensor([[8.0, 2.0, 4.0, 2.0, 1.0, 1.0, 0.5, 1.0]]))  # scale 8 / 6; 3 is the most
    module = nn.Sequential(nn.Linear(8, 4))
    target = replace(targets_of(module)["0"], rule=Rule(inputs=quantizer))
    state = BlockState(module, "", None, [target])
    state.records["0"] = Record(target=target, inputs=(quantizer, params))
    (row,) = block_rows(state)
    assert row.input_shifts == (1, 1, 2, 4)
    assert row.input_scale == pytest.approx(8 / 6)


def test_wider_shifts_reach_further() -> None:
    """Channels that differ by 2^10: two exponent bits can't span that, four can."""
    x, matrix = draw("gaussian", 512, 64) * torch.logspace(0, 10, 64, 2.0), draw("gaussian", 16, 64)
    matrix /= torch.logspace(0, 10, 64, 2.0)  # so that every channel counts
    errors = {}
    for line in ("e2m1 tensor static", "e2m1 shifted static", "e2m1 shifted=4 static"):
        assert str(Quantizer(str(Quantizer(line)))) == str(Quantizer(line))
        found = solve(make_solver("llm-fp4", {"grid": 40}), matrix, x, "float8_e4m3fn channel", line)
        errors[line] = found.error
        if found.inputs is not None and isinstance(found.inputs[1].scale, Factored):
            shifts = -dense(found.inputs[1].scale.factors[1]).log2()
            limit = 15 if "=4" in line else 2 ** found.inputs[0].format.e - 1  # type: ignore[attr-defined]
            assert 0 == int(shifts.min()) < int(shifts.max()) <= limit
            assert torch.equal(
                layer(matrix, found)(x),
                found.inputs[0].fake_quantize(x, found.inputs[1]) @ (found.weight.dequantize().T),
            )
    tensor, plain, wide = errors.values()
    assert wide < 0.5 * plain < 0.5 * tensor
    assert Quantizer("nf4 shifted=3 static").granularity.bits == 3  # type: ignore[attr-defined]
    with pytest.raises(GranularityError, match="1 to 5 bits"):
        Quantizer("e2m1 shifted=9")


def test_a_silent_channel_is_accepted() -> None:
    x, matrix = outlier_inputs(), draw("gaussian", 16, 64)
    x[:, 10] = 0
    matrix[3] = 0
    found = solve(make_solver("llm-fp4", {"grid": 20}), matrix, x, "e2m1 channel", "e2m1 shifted static")
    assert bool(torch.isfinite(layer(matrix, found)(x)).all())
    assert not found.weight.dequantize()[3].any()
    silent = solve(make_solver("llm-fp4", {"grid": 20}), matrix, x * 0, "e2m1 channel", "e2m1 shifted static")
    assert bool(torch.isfinite(layer(matrix, silent)(x)).all())


# ------------------------------------------------------------------------------------------------------ 8: bad input
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"low": 1.2, "high": 0.01}, "reversed"),
        ({"low": 0.0}, "reversed or empty"),
        ({"grid": 0}, "grid=0"),
        ({"rounds": 0}, "rounds=0"),
        ({"tokens": 0}, "tokens=0"),
        ({"loss": "fischer"}, "neither output nor fisher"),
    ],
)
def test_bad_options(options: dict[str, object], text: str) -> None:
    with pytest.raises(NybbleError, match=text):
        make_solver("llm-fp4", options)


def test_bad_formats_and_inputs() -> None:
    solver = make_solver("llm-fp4", {})
    with pytest.raises(SchemeError, match="2 bits"):
        solver.quantizer_for(Quantizer("float2_e1m0_finite channel"))
    with pytest.raises(FormatError, match="exponent bit"):
        Quantizer("float4_e0m3_finite")
    with pytest.raises(SchemeError, match="rank1"):
        solver.quantizer_for(Quantizer("int4 rank1"))
    with pytest.raises(SchemeError, match="stochastic"):
        solver.quantizer_for(Quantizer("e2m1 channel rounding=stochastic"))
    with pytest.raises(SchemeError, match="shifted columns"):
        Quantizer("nf4 shifted static")
    x = outlier_inputs()
    x[5, 5] = torch.nan
    with pytest.raises(DataError, match="inputs of layer hold NaN"):
        solve(solver, draw("gaussian", 8, 64), x, "e2m1 channel", "e2m1 tensor static")


def test_inputs_without_weights_are_refused(tmp_path: Path) -> None:
    from tests.tiny import save_text, save_tiny

    import nybble
    from nybble.recipe import parse_recipe

    folder, text = save_tiny(tmp_path / "float"), save_text(tmp_path / "text.txt")
    recipe = parse_recipe({"name": "x", "scheme": {"inputs": "e2m1 tensor static"}, "steps": [{"solver": "llm-fp4"}]})
    with pytest.raises(SchemeError, match="searches inputs together with weights"):
        nybble.quantize(str(folder), recipe, str(text), settings=nybble.Settings(samples=4, seq_len=12))


def test_no_input_is_reported() -> None:
    found = solve(
        make_solver("llm-fp4", {"grid": 20}), draw("student5", 8, 64), None, "e2m1 channel", "e2m1 tensor static"
    )
    assert any("no calibration input" in note for note in found.notes)
    assert found.inputs is None
    assert found.error < found.rtn_error


# ----------------------------------------------------------------------------------------------- the quadratic forms
@pytest.mark.parametrize("fisher", [False, True])
def test_quadratic_forms_are_the_layer_error(fisher: bool) -> None:
    x, matrix = outlier_inputs(256, 32), draw("gaussian", 24, 32)
    rounded_x, rounded_w = Quantizer("e2m1 shifted").fake_quantize(x), Quantizer("e2m1 channel").fake_quantize(matrix)
    token = draw("uniform", 256, 1).abs() if fisher else None
    every = token.expand(256, 24) if token is not None else None
    expected = output_error(x, rounded_x, matrix, rounded_w, every)
    by_row = InputsFixed.of_inputs(x, rounded_x, token).of(matrix)(rounded_w)
    assert by_row.shape == (24,)
    for_inputs = output_error(x, rounded_x, matrix, matrix, every)  # the same for all weights, and left out
    assert float(by_row.sum()) + for_inputs == pytest.approx(expected, rel=2e-2)
    assert float(WeightsFixed(x, matrix, rounded_w, every)(rounded_x)) == pytest.approx(expected, rel=2e-2)


def test_quadratic_forms_of_groups_are_those_of_each_group() -> None:
    x = torch.stack([outlier_inputs(256, 9), draw("gaussian", 256, 9), draw("uniform", 256, 9)])
    matrix = draw("student5", 6, 9)
    rounded_x, rounded_w = Quantizer("e2m1 tensor").fake_quantize(x), Quantizer("e2m1 channel").fake_quantize(matrix)
    by_row = InputsFixed.of_inputs(x, rounded_x).of(matrix)(rounded_w)
    parts = [slice(0, 2), slice(2, 4), slice(4, 6)]
    for group, rows in enumerate(parts):
        alone = InputsFixed.of_inputs(x[group], rounded_x[group]).of(matrix[rows])(rounded_w[rows])
        assert torch.allclose(by_row[rows], alone, rtol=1e-2)
    errors = [output_error(x[g], rounded_x[g], matrix[rows], rounded_w[rows]) for g, rows in enumerate(parts)]
    assert output_error(x, rounded_x, matrix, rounded_w) == pytest.approx(sum(errors))
    three = (matrix.view(3, 2, 9), rounded_w.view(3, 2, 9))
    assert float(WeightsFixed(x, *three)(rounded_x)) * 3 == pytest.approx(sum(errors), rel=2e-2)


def test_fisher_follows_the_outputs_that_matter() -> None:
    x, matrix = outlier_inputs(), draw("student5", 24, 64)
    importance = torch.full((512, 24), 1e-3)
    importance[:, :4] = 1.0
    stats = Stats(inputs=x, quantizer=Quantizer("e2m1 tensor static"), fisher={"layer": importance})
    given = [Weight(name="layer", matrix=matrix, quantizer=Quantizer("e2m1 channel"))]
    solver = make_solver("llm-fp4", {"loss": "fisher", "grid": 40})
    found = solver.solve(given, stats)[0]
    plain = make_solver("llm-fp4", {"grid": 40}).solve(given, stats)[0]
    power = output_error(x, None, matrix, torch.zeros_like(matrix), importance)

    def weighted(solved: Solved) -> float:
        quantizer, params = solved.inputs or (Quantizer("e2m1"), None)
        rounded = quantizer.fake_quantize(x, params)
        return output_error(x, rounded, matrix, solved.weight.dequantize(), importance) / power

    assert weighted(found) == pytest.approx(found.error, rel=1e-5)
    assert weighted(found) <= weighted(plain)


def test_layers_that_read_one_input_share_its_quantizer() -> None:
    x = outlier_inputs()
    given = [
        Weight(name=str(i), matrix=draw("student5", 16, 64, seed=i), quantizer=Quantizer("e2m1 channel"))
        for i in (1, 2)
    ]
    stats = Stats(inputs=x, quantizer=Quantizer("e2m1 shifted static"))
    first, second = make_solver("llm-fp4", {"grid": 30}).solve(given, stats)
    assert first.inputs is second.inputs is not None
    assert first.error + second.error < first.rtn_error + second.rtn_error


def test_layers_that_read_one_input_count_by_their_relative_errors() -> None:
    """So a layer with weights 1024 times as large has no more say, though it reads other columns than the first."""
    x = outlier_inputs(loud=32)
    loud, quiet = draw("student5", 16, 64, seed=1), draw("student5", 16, 64, seed=2)
    loud[:, 32:], quiet[:, :32] = 0, 0
    found = []
    for factor in (1, 1024):
        given = [
            Weight(name=name, matrix=matrix, quantizer=Quantizer("e2m1 channel"))
            for name, matrix in (("loud", loud), ("quiet", factor * quiet))
        ]
        stats = Stats(inputs=x, quantizer=Quantizer("e2m1 tensor static"))
        found.append(make_solver("llm-fp4", {"grid": 30}).solve(given, stats))
    for one, other in zip(*found, strict=True):
        assert one.inputs is not None and other.inputs is not None
        assert one.inputs[0] == other.inputs[0]
        assert torch.equal(torch.as_tensor(one.inputs[1].scale), torch.as_tensor(other.inputs[1].scale))
        assert one.error == pytest.approx(other.error, rel=1e-4)


@pytest.mark.parametrize(("fine", "whole", "tried"), [(0, True, 17), (0, False, 17), (2, True, 19), (2, False, 2)])
def test_the_whole_grid_is_for_the_first_round_of_a_quick_search(fine: int, whole: bool, tried: int) -> None:
    """Later rounds of it stay in the format that was found, within a step of its fraction."""
    method, x = LlmFp4(grid=5, fine=fine, low=0.1, high=1.6), draw("student3", 1, 4096)
    ladders = method.ladders(x, Quantizer("e2m1 tensor"))
    fraction = torch.tensor([0.9])
    before = _Choice(ladders[0], fraction, ladders[0].values(fraction))
    errors: list[float] = []

    def error(values: Tensor) -> Tensor:
        errors.append(float((values - x).square().mean()))
        return torch.tensor(errors[-1:])

    found = method.choose(ladders, before, error, whole)
    assert (
        len(errors) == 1 + tried
    )  # three formats: five fractions each, and min-max of the other two; then the fine ones
    assert float((found.values - x).square().mean()) == pytest.approx(min(errors))
    assert found.ladder.quantizer.format.name == (FP4[0] if tried > 2 else FP4[1])
    if tried == 2:
        assert 0.9 / 2 < float(found.fraction) < 0.9 * 2


def test_ladder_of_an_asymmetric_integer_keeps_its_zero_point() -> None:
    x = draw("gaussian", 8, 64) + 2
    ladder = Ladder(x, Quantizer("int4 group=16 symmetric=false"))
    whole = ladder.values(torch.ones(8))
    assert torch.equal(whole, Quantizer("int4 group=16 symmetric=false").fake_quantize(x))
    assert not torch.equal(ladder.values(torch.full((8,), 0.7)), whole)
    grid = fractions(0.01, 1.2, 100, torch.device("cpu"))
    assert grid[0] == pytest.approx(0.01) and grid[-1] == pytest.approx(1.2) and len(grid) == 100


# ------------------------------------------------------------------------------------------- Fisher weights of a model
def test_fisher_of_a_model_is_the_squared_gradient(tmp_path: Path) -> None:
    """Against the definition: E over labels of the model's own distribution, on the last linear layer."""
    from tests.tiny import input_ids, save_text, save_tiny, tiny_model

    import nybble
    from nybble.calibration.fisher import fisher_of
    from nybble.models.adapter import adapter_for
    from nybble.recipe import parse_recipe

    model = tiny_model("llama", torch.float32)
    name = "model.layers.1.mlp.down_proj"
    ids = input_ids()[:1].repeat(400, 1)  # the same sequence with 400 draws of labels
    found = (
        fisher_of(
            model, adapter_for(model), {name: 32}, {"input_ids": ids}, batch=100, tokens=ids.numel(), most=10**6, seed=0
        )[name]
        .reshape(400, 12, 32)
        .mean(0)
    )
    kept: dict[str, Tensor] = {}
    handle = model.get_submodule(name).register_forward_hook(lambda _, __, output: kept.update(output=output))
    logits = model(input_ids=ids[:1], use_cache=False).logits[0].float()
    handle.remove()
    expected = torch.zeros(12, 32)
    chances = logits.softmax(-1).detach()
    for token in range(12):  # sum over labels of p(label) (d log p / d output)^2; other tokens' outputs see it as well
        for label in range(logits.shape[1]):
            gradient = torch.autograd.grad(logits[token].log_softmax(-1)[label], kept["output"], retain_graph=True)[0]
            expected += chances[token, label] * gradient[0].square()
    assert torch.allclose(found, expected, rtol=0.6, atol=float(expected.mean()) * 0.5)
    assert float(found.mean()) == pytest.approx(float(expected.mean()), rel=0.1)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())

    folder, text = save_tiny(tmp_path / "float"), save_text(tmp_path / "text.txt")
    scheme = {"weights": "e2m1 channel", "inputs": "e2m1 shifted static"}
    step = {"solver": "llm-fp4", "grid": 8, "rounds": 1}
    settings = nybble.Settings(samples=4, seq_len=12, batch=2)
    errors = []
    for loss in ("output", "fisher"):
        recipe = parse_recipe({"name": "x", "scheme": scheme, "steps": [{**step, "loss": loss}]})
        _, report = nybble.quantize(str(folder), recipe, str(text), settings=settings)
        assert all(row.error < row.rtn_error for row in report.layers)  # type: ignore[operator]
        errors.append([row.error for row in report.layers])
    assert errors[0] != errors[1]


def test_fisher_of_experts_and_tied_tables_is_their_output_error(tmp_path: Path) -> None:
    """They have no gradients of their own, but still see their inputs."""
    from tests.tiny import save_text, save_tiny

    import nybble
    from nybble.recipe import parse_recipe

    text = save_text(tmp_path / "text.txt")
    step = {"solver": "llm-fp4", "loss": "fisher", "grid": 6, "rounds": 1}
    settings = nybble.Settings(samples=6, seq_len=16, batch=2)
    for family, targets, part in (
        ("mixtral", ["Linear"], "experts"),
        ("llama", ["Linear", "Embedding"], "embed_tokens"),
    ):
        scheme = {"targets": targets, "weights": "e2m1 channel"}
        recipe = parse_recipe({"name": "x", "scheme": scheme, "steps": [step]})
        folder = save_tiny(tmp_path / family, family)
        _, report = nybble.quantize(str(folder), recipe, str(text), settings=settings)
        rows = [row for row in report.layers if part in row.name]
        seen = [row for row in rows if not any("no calibration input" in note for note in row.notes)]
        assert rows and len(seen) > len(rows) / 2  # a few experts get no token


def test_fisher_needs_a_path_to_the_output(tmp_path: Path) -> None:
    from tests.tiny import input_ids, tiny_model

    from nybble.calibration.fisher import fisher_of
    from nybble.models.adapter import adapter_for

    model = tiny_model("llama", torch.float32)
    model.model.layers[1].mlp.forward = lambda x: (x * 0).detach()  # nothing of the MLP gets out
    with pytest.raises(DataError, match=r"no gradient .* reached model.layers.1.mlp.down_proj"):
        names = {"model.layers.1.mlp.down_proj": 32}
        fisher_of(model, adapter_for(model), names, {"input_ids": input_ids()}, batch=2, tokens=24, most=99, seed=0)


def test_what_was_searched_gives_way_to_min_max(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and inputs together: the one were chosen for the other."""
    x, matrix, solver = outlier_inputs(), draw("student5", 16, 64), make_solver("llm-fp4", {"grid": 4, "rounds": 1})

    def worst(self: LlmFp4, ladders: Sequence[Ladder], before: _Choice, error: Error, whole: bool) -> _Choice:
        fraction = torch.full_like(before.fraction, 0.02)
        return _Choice(before.ladder, fraction, before.ladder.values(fraction))

    monkeypatch.setattr(LlmFp4, "choose", worst)
    found = solve(solver, matrix, x, "e2m1 channel", "e2m1 tensor static")
    assert "min-max was better" in found.notes[0] and found.error == found.rtn_error
    assert found.inputs is not None and found.clip is not None
    plain = Quantizer("e2m1 tensor static").fit(x)
    assert torch.equal(torch.as_tensor(found.inputs[1].scale), torch.as_tensor(plain.scale))
    assert found.clip.eq(1).all()


def test_tokens_on_which_candidates_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    fixed = WeightsFixed.__init__

    def noted(self: WeightsFixed, x: Tensor, *args: Any) -> None:
        rows.append(len(x))
        fixed(self, x, *args)

    monkeypatch.setattr(WeightsFixed, "__init__", noted)
    for tried, wanted in ((0, 512), (128, 128)):
        rows.clear()
        solver = make_solver("llm-fp4", {"grid": 4, "tried": tried})
        solve(solver, draw("student5", 16, 64), outlier_inputs(), "e2m1 channel", "e2m1 tensor static")
        assert set(rows) == {wanted}
