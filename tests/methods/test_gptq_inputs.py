"""GPTQ with ``inputs: both``: the float network's outputs are what its weights aim at."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_text, save_tiny, tiny_model, tiny_tokenizer
from torch import Tensor, nn

import nybble
from nybble.calibration.block import BlockState
from nybble.calibration.error import Drift, relative_error
from nybble.calibration.statistics import DriftMoments
from nybble.calibration.trace import HIDDEN, BlockCall
from nybble.calibration.watch import layer_moments
from nybble.calibration.window import Calibration, Window
from nybble.core.errors import SchemeError
from nybble.corrections.refine_scales import RefineScales
from nybble.data import load_text, token_samples
from nybble.models.adapter import adapter_for
from nybble.nn.kinds import Quantized, kind_of
from nybble.quantizer import Quantizer
from nybble.recipe import parse_recipe
from nybble.scheme import Rule, parse_scheme
from nybble.solvers import Solved, Stats, Weight
from nybble.solvers.gptq import Gptq
from nybble.walk.plan import make_plan
from nybble.walk.steps.solver import SolverStep

ROWS, COLUMNS, TOKENS = 12, 16, 400


def test_the_widest_inputs_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the largest second moment is let go of before the others' work begins."""
    widths, plain = list[int](), Gptq.solve

    def noted(self: Gptq, weights: Any, stats: Stats) -> Any:
        widths.append(weights[0].matrix.shape[1])
        return plain(self, weights, stats)

    monkeypatch.setattr(Gptq, "solve", noted)
    ids = torch.randint(3, 50, (6, 12), generator=torch.Generator().manual_seed(2))
    model = tiny_model()
    nybble.quantize(model, "gptq", ids, settings={"batch": 2}, weights="int4 group=16")
    blocks, groups = len(model.model.layers), 4
    assert len(widths) == blocks * groups
    for start in range(0, len(widths), groups):
        assert widths[start] == model.config.intermediate_size > max(widths[start + 1 : start + groups])


def layer(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, the float inputs, and what a lossy network in front makes of them; all float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(COLUMNS) + 0.4 * torch.randn(COLUMNS, COLUMNS, generator=generator)
    exact = (torch.randn(TOKENS, COLUMNS, generator=generator) @ mix).double()
    blur = torch.eye(COLUMNS) + 0.05 * torch.randn(COLUMNS, COLUMNS, generator=generator)
    lossy = exact @ blur.double() + 0.1 * torch.randn(TOKENS, COLUMNS, generator=generator).double()
    return torch.randn(ROWS, COLUMNS, generator=generator).double(), exact, lossy


def stats(exact: Tensor, lossy: Tensor) -> Stats:
    apart = exact - lossy
    drift = Drift(power=(apart.T @ apart / TOKENS).float(), cross=(apart.T @ lossy / TOKENS).float())
    return Stats(second_moment=(lossy.T @ lossy / TOKENS).float(), drift=drift)


def solve(solver: Gptq, w: Tensor, seen: Stats, line: str) -> Solved:
    return solver.solve([Weight(name="w", matrix=w.float(), quantizer=Quantizer(line))], seen)[0]


@pytest.mark.parametrize("order", [False, True])
def test_with_sixteen_bits_it_is_least_squares(order: bool) -> None:
    w, exact, lossy = layer()
    solver = Gptq(inputs="both", alpha=1, damping=0.0, activation_order=order)
    found = solve(solver, w, stats(exact, lossy), "float16_e5m10 channel").weight.dequantize().double()
    best = torch.linalg.lstsq(lossy, exact @ w.T).solution.T
    assert torch.allclose(found, best, rtol=2e-3, atol=2e-3) and not torch.allclose(w, best, atol=2e-2)
    least = (exact @ w.T - lossy @ best.T).square().sum()
    assert (exact @ w.T - lossy @ found.T).square().sum() < least * (1 + 1e-4)
    share = replace(solver, alpha=0.25)
    part = solve(share, w, stats(exact, lossy), "float16_e5m10 channel").weight.dequantize().double()
    assert torch.allclose(part, w + (best - w) / 4, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("line", ["int4 group=8", "int4 channel symmetric=false", "nvfp4", "int2 group=8"])
def test_its_error_is_the_float_outputs_and_below_gptqs(line: str) -> None:
    w, exact, lossy = layer()
    seen = stats(exact, lossy)
    both, plain = (solve(Gptq(inputs=inputs), w, seen, line) for inputs in ("both", "quantized"))
    lost = [
        float((exact @ w.T - lossy @ f.weight.dequantize().double().T).square().sum() / (exact @ w.T).square().sum())
        for f in (both, plain)
    ]
    assert both.error == pytest.approx(lost[0], rel=1e-3)
    assert lost[0] < 0.95 * lost[1] and both.error < both.rtn_error and not both.notes


@pytest.mark.parametrize("options", [{"inputs": "both", "alpha": 0.0}, {"inputs": "both", "alpha": 1.1}, {"alpha": 1}])
def test_a_share_that_says_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SchemeError, match="alpha"):
        Gptq(**options)


def test_without_a_drift_it_is_gptq() -> None:
    """Inputs that lost nothing change no bit; those that can't be paired are said."""
    w, exact, _ = layer()
    plain = solve(Gptq(), w, stats(exact, exact), "int4 group=8").weight.dequantize()
    same = solve(Gptq(inputs="both"), w, stats(exact, exact), "int4 group=8")
    assert torch.equal(same.weight.dequantize(), plain) and not same.notes
    unpaired = solve(Gptq(inputs="both"), w, Stats(second_moment=stats(exact, exact).second_moment), "int4 group=8")
    assert torch.equal(unpaired.weight.dequantize(), plain)
    assert "no float inputs to compare with" in unpaired.notes[0]


def test_groups_of_rows_are_solved_as_alone() -> None:
    parts = [layer(seed) for seed in (1, 2)]
    seen = [stats(exact, lossy) for _, exact, lossy in parts]
    moments = torch.stack([s.second_moment for s in seen if s.second_moment is not None])
    drift = Drift(
        power=torch.stack([s.drift.power for s in seen if s.drift]),
        cross=torch.stack([s.drift.cross for s in seen if s.drift]),
    )
    matrix, solver = torch.cat([w for w, _, _ in parts]), Gptq(inputs="both", activation_order=False)
    together = solve(solver, matrix, Stats(second_moment=moments, drift=drift), "int4 channel")
    for found, (w, _, _), each in zip(torch.split(together.weight.dequantize(), ROWS), parts, seen, strict=True):
        alone = solve(solver, w, each, "int4 channel").weight.dequantize()
        assert (found != alone).double().mean() <= 0.02  # a last bit may round otherwise


def test_moments_are_those_of_paired_tokens() -> None:
    """Two batches, the second path's inputs rounded on their way; float inputs are not."""
    quantizer = Quantizer("int4 token")
    _, exact, lossy = layer()
    part = DriftMoments(COLUMNS, quantizer)
    for rows in (slice(0, 150), slice(150, None)):
        part.expect(exact[rows].float())
        part.add(lossy[rows].float())
        part.end_batch()
    found, rounded = part.mean(), quantizer.fake_quantize(lossy.float()).double()
    apart = exact.float().double() - rounded
    assert found is not None
    torch.testing.assert_close(found.cross.double(), apart.T @ rounded / TOKENS, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.power.double(), apart.T @ apart / TOKENS, rtol=1e-4, atol=1e-5)
    part.expect(exact[:5].float())
    part.end_batch()  # the other path never called the layer
    assert part.mean() is None


def window_of(state: BlockState, call: BlockCall, starts: dict[str, list[Tensor]], config: Any = None) -> Window:
    """A block between two streams, in batches."""
    batches, (samples, length) = len(starts["float"]), starts["float"][0].shape[:2]
    calibration = Calibration(
        tokens=batches * samples * length, samples=batches * samples, batches=batches, device=torch.device("cpu"),
        dtype=torch.float32, seed=0, config=config, paths=frozenset(starts),
    )  # fmt: skip
    return Window([state], calibration, lambda path, order: (([call], {HIDDEN: x}) for x in starts[path]), "x")


@torch.no_grad()
def test_each_layer_is_seen_behind_those_that_are_in_place() -> None:
    """What layers read in a float twin and in the block so far quantized, padding left out, as hooks see it."""
    model = tiny_model("llama", torch.float32)
    plan = make_plan(model, adapter_for(model), parse_scheme({"weights": "int2 group=16"}), Gptq(inputs="both"))
    state = BlockState(model.model.layers[0], "model.layers.0", None, plan.blocks[0])
    twin = copy.deepcopy(state.module)
    generator = torch.Generator().manual_seed(0)
    starts = {path: [torch.randn(2, 6, 32, generator=generator) for _ in range(2)] for path in ("float", "quantized")}
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    rotary = model.model.rotary_emb(starts["float"][0], torch.arange(6)[None])
    call = BlockCall(index=0, args=(), kwargs={"position_embeddings": rotary}, keyword=None, start=None, mask=mask)
    window = window_of(state, call, starts, model.config)
    for target in state.targets:  # q, k, v, o, gate, up, down
        name = target.name
        exact = torch.cat([read_at(twin, name, call, x)[mask] for x in starts["float"]]).double()
        lossy = torch.cat([read_at(state.module, name, call, x)[mask] for x in starts["quantized"]]).double()
        moments, drifts = layer_moments(window, "quantized", {name: (target, (None, None))})
        found, second = drifts[name].mean(), moments[name].mean(name)
        assert found is not None and second is not None
        for got, wanted in (
            (second, lossy.T @ lossy),
            (found.cross, (exact - lossy).T @ lossy),
            (found.power, (exact - lossy).T @ (exact - lossy)),
        ):
            torch.testing.assert_close(got.double(), wanted / len(exact), rtol=1e-4, atol=1e-4 * float(second.max()))
        assert target.rule.weights is not None
        made = target.rule.weights.quantize(state.matrix(target).float())
        state.install(target, Quantized(weights=(made,)))


@pytest.mark.parametrize("refine", [False, True])
@torch.no_grad()
def test_what_was_made_up_for_is_not_made_up_for_again(refine: bool) -> None:
    """Two layers in a row behind an invertible loss: the first can undo it alone, so the second has nothing to do."""
    generator = torch.Generator().manual_seed(0)
    block = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Linear(24, 8, bias=False)).requires_grad_(False)
    twin, rule = copy.deepcopy(block), Rule(weights=Quantizer("float16_e5m10 channel"))
    targets = [
        replace(next(iter(kind_of(part).targets(name, part))), rule=rule)  # type: ignore[union-attr]
        for name, part in block.named_children()
    ]
    exact = [torch.randn(2, 50, 16, generator=generator) for _ in range(2)]
    loss = 0.5 * torch.eye(16) if refine else torch.eye(16) + 0.1 * torch.randn(16, 16, generator=generator)
    call = BlockCall(index=0, args=(), kwargs={}, keyword=None, start=None)
    lossy = [x @ loss for x in exact]
    window = window_of(BlockState(block, "", None, targets), call, {"float": exact, "quantized": lossy})
    options = {} if refine else {"inputs": "both", "alpha": 1, "damping": 0.0}
    SolverStep("gptq", Gptq(**options)).run(window)  # type: ignore[arg-type]
    if refine:  # half the inputs ask for twice the scales, of one layer
        RefineScales(alpha=1).run(window, targets, "quantized")
    found, wanted = (torch.cat([m(x) for x in xs]) for m, xs in ((block, lossy), (twin, exact)))
    assert float((found - wanted).square().mean() / wanted.square().mean()) < 1e-5


@torch.no_grad()
def read_at(block: nn.Module, name: str, call: BlockCall, x: Tensor) -> Tensor:
    kept: list[Tensor] = []
    handle = block.get_submodule(name).register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    call.run(block, {HIDDEN: x})
    handle.remove()
    return kept[0]


def test_blocks_come_closer_to_the_float_network(tmp_path: Path) -> None:
    """What the last block gives, against the float one's: with both streams less is lost than with one."""
    folder = save_tiny(tmp_path / "float", dtype=torch.float32)
    text = load_text(str(save_text(tmp_path / "text.txt")), "calibration")
    tokens = token_samples(text, tiny_tokenizer(), samples=16, seq_len=24)
    settings = nybble.Settings(samples=16, seq_len=24, batch=16, dtype=torch.float32)
    exact = outputs(nybble.load(folder, dtype=torch.float32)[0], tokens.input_ids)
    lost: dict[str, float] = {}
    errors: dict[str, list[float]] = {}
    for inputs in ("quantized", "both"):
        steps = [{"solver": "gptq", "inputs": inputs}]
        scheme = {"weights": "int3 group=16", "inputs": "int6 token"}
        recipe = parse_recipe({"name": "x", "scheme": scheme, "steps": steps})
        model, report = nybble.quantize(str(folder), recipe, tokens, settings=settings)
        lost[inputs] = float((outputs(model, tokens.input_ids) - exact).square().mean())
        errors[inputs] = [row.error for row in report.layers if row.error is not None]
        plain = [row.rtn_error for row in report.layers if row.rtn_error is not None]
        assert all(error <= rtn for error, rtn in zip(errors[inputs], plain, strict=True))
    assert lost["both"] < 0.95 * lost["quantized"]
    assert errors["both"][-1] > errors["quantized"][-1]  # it counts what was lost before


@torch.no_grad()
def outputs(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return found


def test_experts_are_solved_as_before(tmp_path: Path) -> None:
    """Tokens that either network sends elsewhere can't be paired: the report says which layers that is."""
    folder, text = save_tiny(tmp_path / "float", "mixtral"), save_text(tmp_path / "text.txt")
    recipe = parse_recipe(
        {"name": "x", "scheme": {"weights": "int4 group=16"}, "steps": [{"solver": "gptq", "inputs": "both"}]}
    )
    tokens = token_samples(load_text(str(text), "calibration"), tiny_tokenizer(), samples=8, seq_len=16)
    settings = nybble.Settings(samples=8, seq_len=16, batch=4)
    _, report = nybble.quantize(str(folder), recipe, tokens, settings=settings)
    unpaired = {row.name for row in report.layers if any("no float inputs" in note for note in row.notes)}
    assert unpaired and all(".experts." in name for name in unpaired)


def test_relative_error_against_float_outputs() -> None:
    w, exact, lossy = layer()
    seen, approximation = stats(exact, lossy), torch.round(w * 4) / 4
    assert seen.drift is not None
    for alpha in (1, 0.3):
        aim = (lossy + alpha * (exact - lossy)) @ w.T
        wanted = (aim - lossy @ approximation.T).square().sum() / aim.square().sum()
        found = relative_error(w.float(), approximation.float(), seen.second_moment, seen.drift.share(alpha))
        assert found == pytest.approx(float(wanted), rel=1e-4)
