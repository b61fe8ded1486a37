"""Second moments that gradients of the loss weigh (GuidedQuant): numpy's, GPTQ's where all tokens count alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import tiny_model
from torch import Tensor

import nybble
from nybble.calibration.error import Drift, relative_error
from nybble.calibration.fisher import guides_of, log_likelihood
from nybble.calibration.statistics import GuidedMoments, SecondMoment, row_groups
from nybble.core.errors import SchemeError
from nybble.core.seeds import derive_seed
from nybble.models.adapter import adapter_for
from nybble.nn.packed import Packed
from nybble.quantizer import Quantizer
from nybble.recipe import parse_recipe
from nybble.solvers import Stats, Weight, make_solver
from nybble.walk.steps.solver import SolverStep

TWO = "int2 group=16 symmetric=false"
SETTINGS = nybble.Settings(samples=8, seq_len=16, batch=4, dtype=torch.float32)
NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tokens(samples: int = 8) -> Tensor:
    return torch.randint(3, 300, (samples, 16), generator=torch.Generator().manual_seed(0))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def guides(model: Any, groups: int, inputs: dict[str, Tensor], batch: int = 4) -> dict[str, Tensor]:
    layers = {name: m.out_features for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    layers = {name: rows for name, rows in layers.items() if "layers" in name}
    adapter = adapter_for(model)
    return guides_of(model, adapter, layers, inputs, batch=batch, groups=groups, seed=0)


def by_hand(model: Any, ids: Tensor) -> np.ndarray[Any, Any]:
    """Squared gradients [tokens, rows] of the drawn labels' log likelihood by a layer's outputs."""
    seen: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    handle = model.get_submodule(NAME).register_forward_hook(keep)
    found = []
    for start in range(0, len(ids), 4):
        generator = torch.Generator().manual_seed(derive_seed(0, "fisher", str(start)))
        seen.clear()
        log_likelihood(model(input_ids=ids[start : start + 4], use_cache=False), None, generator).backward()  # type: ignore[no-untyped-call]
        assert seen[0].grad is not None
        found.append(seen[0].grad.flatten(0, 1).square().numpy())
    handle.remove()
    return np.concatenate(found)


@pytest.mark.parametrize("groups", [1, 4, 5])
def test_gradients_are_means_over_groups_of_channels(groups: int) -> None:
    model = tiny_model(dtype=torch.float32)
    squares = by_hand(model, tokens()).astype(np.float64)
    found = guides(model, groups, {"input_ids": tokens()})[NAME]
    assert found.dtype == torch.bfloat16
    count = 4 if groups == 5 else groups  # of 32 rows
    want = squares.reshape(128, count, 32 // count).mean(-1)
    np.testing.assert_allclose(found.float().numpy(), want, rtol=2**-8)


def test_padding_is_left_out() -> None:
    mask = torch.ones(8, 16, dtype=torch.int64)
    mask[:, 11:] = 0
    found = guides(tiny_model(dtype=torch.float32), 2, {"input_ids": tokens(), "attention_mask": mask})
    assert {len(guide) for guide in found.values()} == {88}


def test_moments_are_numpys_and_pairing_is_checked() -> None:
    x, guide = draw(50, 12), draw(50, 3, seed=1).square().bfloat16()
    moments = GuidedMoments(12, guide)
    moments.add(x[:20].view(4, 5, 12))
    assert moments.mean("w") is None  # the other tokens are still to come
    moments.add(x[20:])
    weights = guide.double().numpy()
    weights = weights / weights.mean(0)
    want = np.einsum("tg,ti,tj->gij", weights, x.double().numpy(), x.double().numpy()) / 50
    found = moments.mean("w")
    assert found is not None
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-5, atol=1e-6)
    moments = GuidedMoments(12, guide)
    moments.add(draw(51, 12))
    assert moments.mean("w") is None


@pytest.mark.parametrize("inputs", [None, "int8 token"])
def test_tokens_that_count_alike_give_the_plain_moment(inputs: str | None) -> None:
    """To the last bit, whatever the constant; also where no gradient came at all."""
    quantizer = None if inputs is None else Quantizer(inputs)
    plain = SecondMoment(12, quantizer)
    plain.add(draw(50, 12))
    for constant in (1.0, 3.1e-7, 0.0):
        moments = GuidedMoments(12, torch.full((50, 2), constant).bfloat16(), quantizer)
        moments.add(draw(50, 12))
        found = moments.mean("w")
        assert found is not None and all(torch.equal(each, plain.mean("w")) for each in found)  # type: ignore[arg-type]


def test_groups_divide_the_rows() -> None:
    assert [row_groups(rows, 4) for rows in (32, 6, 5, 1)] == [4, 3, 1, 1]
    assert row_groups(7, 100) == 7


# ------------------------------------------------------------------------------------------------ solvers
W, X = draw(32, 64), draw(300, 64, seed=1) * draw(64, seed=2).exp()
H = X.T @ X / 300
MANY = torch.stack([(X * w[:, None]).T @ X / 300 for w in draw(4, 300, seed=3).square().square()])
DRIFT = Drift(power=0.01 * H, cross=0.1 * draw(64, 64, seed=4) @ H)
OPTIONS: list[dict[str, Any]] = [{}, {"activation_order": False}, {"clip": False}, {"inputs": "both"}, {"block": 7}]


def solve(solver: str, line: str, stats: Stats, **options: Any) -> Any:
    return make_solver(solver, options).solve([Weight(name="w", matrix=W, quantizer=Quantizer(line))], stats)[0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("line", [TWO, "int3 channel", "nvfp4", "mxfp4", "int3 group=16 scale=minmax(offset=true)"])
def test_equal_moments_give_gptqs_codes(line: str, options: dict[str, Any]) -> None:
    both = DRIFT if options.get("inputs") == "both" else None
    plain = solve("gptq", line, Stats(second_moment=H, drift=both), **options)
    guided = solve(
        "gptq", line, Stats(second_moment=H, guided={"w": H.expand(4, 64, 64)}, drift=both), guided=4, **options
    )
    mine, theirs = guided.weight.tensors(), plain.weight.tensors()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("solver", "options"), [("gptq", each) for each in OPTIONS[:4]] + [("decoupleq", {})], ids=str)
def test_each_group_is_rounded_for_its_own_moment(solver: str, options: dict[str, Any]) -> None:
    """It loses less than plain under the moments that it is given, and never more than rounding to nearest."""
    both = DRIFT if options.get("inputs") == "both" else None
    plain = solve(solver, TWO, Stats(second_moment=H, drift=both), **options)
    guided = solve(solver, TWO, Stats(second_moment=H, guided={"w": MANY}, drift=both), guided=4, **options)
    assert guided.error < guided.rtn_error
    if both is None:
        errors = [relative_error(W, each.weight.dequantize(), MANY) for each in (guided, plain)]
        assert errors[0] < 0.97 * errors[1]
        assert guided.error == pytest.approx(errors[0], rel=1e-4)
    assert any("in 4 groups of rows" in note for note in guided.notes)


def test_a_group_of_rows_is_what_gptq_makes_of_it_alone() -> None:
    """With scales that no other group shares."""
    whole = solve("gptq", "int2 channel", Stats(second_moment=H, guided={"w": MANY}), guided=4).weight.dequantize()
    for number in range(4):
        rows = slice(8 * number, 8 * number + 8)
        weight = Weight(name="w", matrix=W[rows].contiguous(), quantizer=Quantizer("int2 channel"))
        (alone,) = make_solver("gptq", {}).solve([weight], Stats(second_moment=MANY[number]))
        assert torch.equal(alone.weight.dequantize(), whole[rows])


def test_without_gradients_a_weight_is_solved_plainly_and_says_so() -> None:
    plain, guided = (solve("gptq", TWO, Stats(second_moment=H), guided=groups) for groups in (0, 4))
    assert torch.equal(plain.weight.codes, guided.weight.codes)
    assert any("solved as with guided=0" in note for note in guided.notes) and not plain.notes


# ------------------------------------------------------------------------------------------------ whole models
def quantized(step: dict[str, Any], model: Any = None, **more: Any) -> tuple[Any, Any]:
    steps = [*more.get("before", []), step]
    made = parse_recipe({"name": "made", "scheme": more.get("scheme", {"weights": TWO}), "steps": steps})
    return nybble.quantize(
        tiny_model(dtype=torch.float32) if model is None else model, made, tokens(), settings=SETTINGS
    )


@pytest.mark.parametrize("options", [{}, {"inputs": "both"}], ids=str)
def test_constant_gradients_in_a_model_give_gptqs_codes(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    from nybble.walk import lane

    def constant(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {name: torch.full_like(guide, 0.3) for name, guide in guides_of(*args, **kwargs).items()}

    monkeypatch.setattr(lane, "guides_of", constant)
    plain, guided = (quantized({"solver": "gptq", **options, **more})[0] for more in ({}, {"guided": 4}))
    names = [name for name, module in plain.named_modules() if isinstance(module, Packed)]
    assert names
    for name in names:
        one, other = (m.get_submodule(name).qtensor() for m in (plain, guided))
        assert all(torch.equal(tensor, other.tensors()[key]) for key, tensor in one.tensors().items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_every_layer_in_a_block_sees_its_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also GPT-2's transposed layers; experts of a fused weight have no outputs of their own to ask."""
    seen: dict[str, int] = {}
    real = SolverStep._answers

    def answers(self: Any, weights: Any, stats: Stats) -> Any:
        seen.update({w.name: len(stats.guided.get(w.name, ())) for w in weights})
        return real(self, weights, stats)

    monkeypatch.setattr(SolverStep, "_answers", answers)
    scheme = {"targets": ["Experts", "Linear"] if family == "mixtral" else ["Linear"], "weights": TWO}
    _, report = quantized({"solver": "gptq", "guided": 2}, tiny_model(family, dtype=torch.float32), scheme=scheme)
    assert seen and {name: count for name, count in seen.items() if "experts" not in name} == {
        row.name: 2 for row in report.layers if "experts" not in row.name
    }


def test_behind_a_rotation_it_is_refused() -> None:
    with pytest.raises(SchemeError, match=r"guided weighs inputs.*behind transform 'rotate'.*leave guided out"):
        quantized({"solver": "gptq", "guided": 2}, before=[{"transform": "rotate"}])
    with pytest.raises(SchemeError, match="guided=-1"):
        make_solver("gptq", {"guided": -1})
