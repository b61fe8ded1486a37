"""AWQ: the factors by a search written out for itself; no layer's output error ever rises (Lin et al. 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import logits, save_text, tiny_model, tiny_tokenizer
from torch import Tensor

import nybble
from nybble.calibration.block import BlockState
from nybble.calibration.trace import HIDDEN, BlockCall, capture_block_calls
from nybble.calibration.window import Calibration, Window
from nybble.core.errors import SchemeError
from nybble.data import load_text, token_samples
from nybble.models.adapter import LinearFold, NormFold, adapter_for
from nybble.quantizer import Quantizer
from nybble.recipe import parse_recipe
from nybble.scheme import parse_scheme
from nybble.solvers import Stats, Weight
from nybble.solvers.rtn import Rtn
from nybble.transforms import make_transform
from nybble.transforms._folds import Channel
from nybble.transforms.awq import Awq
from nybble.walk.plan import make_plan

LINE = "int3 group=8 symmetric=false scale_format=float32"


def inputs(seed: int = 0) -> Tensor:
    """Correlated, some channels loud, one never used."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(16) + 0.3 * torch.randn(16, 16, generator=generator)
    x = torch.randn(300, 16, generator=generator) @ mix
    x[:, [2, 11]] *= 12
    x[:, 5] = 0
    return x


def channel(x: Tensor, behind: list[Tensor], quantizers: list[Quantizer | None], **changes: Any) -> Channel:
    given: dict[str, Any] = {
        "fold": NormFold(norm="n", readers=("a", "b")), "largest": x.abs().amax(0), "before": None, "behind": behind,
        "rows": None, "quantizers": quantizers, "mean": x.abs().mean(0), "moment": x.T @ x / len(x),
    }  # fmt: skip
    return Channel(**{**given, **changes})


def by_hand(x: np.ndarray, weights: list[np.ndarray], duo: bool) -> tuple[np.ndarray, float]:
    """All twenty alphas on the outputs themselves, with rounding to 3 bits in groups of 8 of its own; float64."""

    def rounded(w: np.ndarray) -> np.ndarray:
        groups = w.reshape(-1, 8)
        low, high = np.minimum(groups.min(1), 0)[:, None], np.maximum(groups.max(1), 0)[:, None]
        step = (high - low) / 7
        zero = np.round(-low / step)
        return np.asarray((np.clip(np.round(groups / step) + zero, 0, 7) - zero) * step).reshape(w.shape)

    def lost(s: np.ndarray) -> float:
        return sum(float(np.square(x @ (rounded(w * s) / s - w).T).sum()) for w in weights)

    size, used = np.abs(x).mean(0), np.abs(x).mean(0) > 0
    every = np.concatenate(weights)
    small = (np.abs(every).reshape(-1, 8) / (np.abs(every).reshape(-1, 8).max(1)[:, None] + 1e-6)).reshape(every.shape)
    best, least = np.ones(16), lost(np.ones(16))
    for step in range(20):
        alpha = step / 20
        s = np.clip(size**alpha / ((small.mean(0) ** (1 - alpha) + 1e-4) if duo else 1), 1e-4, None)
        s = np.where(used, s / np.sqrt(s[used].max() * s[used].min()), 1)
        if lost(s) < least:
            best, least = s, lost(s)
    return best, least / lost(np.ones(16))


@pytest.mark.parametrize("duo", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_factor_is_the_searched_one(seed: int, duo: bool) -> None:
    x, generator = inputs(seed), torch.Generator().manual_seed(seed + 10)
    behind = [torch.randn(12, 16, generator=generator), torch.randn(6, 16, generator=generator)]
    wanted, gain = by_hand(x.double().numpy(), [w.double().numpy() for w in behind], duo)
    found = Awq(duo=duo).factor(channel(x, behind, [Quantizer(LINE), Quantizer(LINE)]))
    torch.testing.assert_close(found, torch.from_numpy(wanted).float(), rtol=1e-4, atol=0)
    assert gain < 0.95 and found[5] == 1 and len(set(found.tolist())) > 10


def test_only_what_is_rounded_counts_and_shared_rows_share() -> None:
    x, generator = inputs(), torch.Generator().manual_seed(0)
    behind = [torch.randn(12, 16, generator=generator), torch.randn(6, 16, generator=generator)]
    alone = Awq().factor(channel(x, behind[:1], [Quantizer(LINE)]))
    beside = Awq().factor(channel(x, behind, [Quantizer(LINE), None]))
    assert torch.equal(alone, beside) and len(set(alone.tolist())) > 10
    assert bool((Awq().factor(channel(x, behind, [None, None])) == 1).all())
    experts = Awq().factor(channel(x, [torch.stack([behind[0][:6], behind[0][6:]])], [Quantizer(LINE)]))
    torch.testing.assert_close(experts, alone)
    # judged as it is done: two channels that one row feeds are multiplied by the larger factor of both
    fold, rows = LinearFold(first="v", second="o"), torch.arange(16) % 8
    shared = channel(x, behind[:1], [Quantizer(LINE)], fold=fold, rows=rows)
    taken = shared.taken(Awq().factor(shared))
    assert torch.equal(taken[:8], taken[8:])


@pytest.mark.parametrize("line", ["int3 group=16 symmetric=false", "nvfp4", "int4 channel"])
@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
@torch.no_grad()
def test_output_errors_never_rise_and_the_float_block_stays(family: str, line: str) -> None:
    """Of all layers that read one norm, or one linear layer, together; measured on their inputs as hooks see them."""
    model = tiny_model(family, torch.float32)
    adapter = adapter_for(model)
    plan = make_plan(model, adapter, parse_scheme({"weights": line}), Rtn())
    name = adapter.block_names(model)[0]
    state = BlockState(model.get_submodule(name), name, None, plan.blocks[0])
    tokens = {"input_ids": torch.randint(3, 50, (4, 16), generator=torch.Generator().manual_seed(0))}
    call = capture_block_calls(model, tokens)[0]
    start: Any = call.start
    calibration = Calibration(
        tokens=64, samples=4, batches=1, device=torch.device("cpu"), dtype=torch.float32, seed=0, config=model.config
    )
    window = Window([state], calibration, lambda path, order: [([call], start)], "block-0000")
    config = model.config
    folds = [*adapter.norm_folds_of(state.module, config), *adapter.linear_folds_of(state.module, config)]
    lost, before = [errors(state, call, start, folds, Quantizer(line))], call.run(state.module, start)[HIDDEN]
    make_transform("awq", {}).run(window, adapter, "float")
    lost.append(errors(state, call, start, folds, Quantizer(line)))
    torch.testing.assert_close(
        call.run(state.module, start)[HIDDEN], before, rtol=1e-4, atol=1e-4 * float(before.std())
    )
    assert all(after <= was * (1 + 1e-4) for was, after in zip(*lost, strict=True))
    assert sum(after < 0.999 * was for was, after in zip(*lost, strict=True)) >= 1


def errors(state: BlockState, call: BlockCall, start: Any, folds: list[Any], quantizer: Quantizer) -> list[float]:
    """By fold, ``sum |(Q(W) - W) x|^2`` over the layers behind that are modules."""
    readers = [f.readers if isinstance(f, NormFold) else (f.second,) for f in folds]
    names = [[name for name in each if state.has(f"{name}.weight")] for each in readers]
    seen: dict[str, Tensor] = {}
    handles = [
        state.module.get_submodule(n).register_forward_pre_hook(lambda _, args, n=n: seen.update({n: args[0]}))
        for each in names
        for n in each
    ]
    call.run(state.module, start)
    for handle in handles:
        handle.remove()
    found = []
    for each in names:
        total = 0.0
        for target in (t for t in state.targets if t.name in each):
            w = state.matrix(target)
            apart = seen[target.name].reshape(-1, w.shape[1]) @ (quantizer.fake_quantize(w) - w).T
            total += float(apart.double().square().sum())
        found.append(total)
    return [x for x in found if x]


def test_it_helps_where_inputs_have_loud_channels(tmp_path: Path) -> None:
    model = tiny_model("llama", torch.float32, num_hidden_layers=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[::9] *= 15
            layer.post_attention_layernorm.weight[::9] *= 15
    model.save_pretrained(tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    text = load_text(str(save_text(tmp_path / "text.txt")), "calibration")
    tokens = token_samples(text, tiny_tokenizer(), samples=8, seq_len=16)
    settings = nybble.Settings(samples=8, seq_len=16, batch=8, dtype=torch.float32)
    exact = logits(nybble.load(tmp_path / "float", dtype=torch.float32)[0])

    def lost(*steps: dict[str, Any]) -> float:
        recipe = parse_recipe({"name": "x", "scheme": {"weights": "int3 group=16 symmetric=false"}, "steps": [*steps]})
        found = nybble.quantize(str(tmp_path / "float"), recipe, tokens, settings=settings)[0]
        return float((logits(found) - exact).square().mean())

    assert lost({"transform": "awq"}, {"solver": "rtn"}) < 0.9 * lost({"solver": "rtn"})


def test_clip_values_are_weighed_by_the_inputs() -> None:
    """By brute force over 0.55 .. 1 of each group's range, under the energy of its own columns."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(8, 32, generator=generator) ** 3
    energy = torch.rand(32, generator=generator) ** 4 + 1e-3
    solver = Rtn(scale="mse(low=0.55,grid=10)", weighted=True)
    weight = Weight(name="w", matrix=w, quantizer=Quantizer("int4 group=16 scale_format=float32"))
    found = solver.solve([weight], Stats(second_moment=torch.diag(energy)))[0]
    best = torch.full((8, 2), torch.inf)
    for fraction in [1.0, *torch.linspace(0.55, 1, 10).tolist()]:
        groups = w.view(8, 2, 16)
        scale = groups.abs().amax(-1, keepdim=True) * fraction / 7
        lost = ((groups / scale).round().clamp(-7, 7) * scale - groups).square() * energy.view(2, 16)
        best = torch.minimum(best, lost.sum(-1))
    assert found.error == pytest.approx(float(best.sum() / (w.square() * energy).sum()), rel=1e-5)
    plain = Rtn(scale="mse(low=0.55,grid=10)").solve([weight], Stats())[0].weight.dequantize()
    assert found.error < float(((plain - w).square() * energy).sum() / (w.square() * energy).sum())


def test_bad_input() -> None:
    with pytest.raises(SchemeError, match="at least one value of alpha"):
        Awq(grid=0)
    with pytest.raises(SchemeError, match=r"searches no scale that weighted=true could move; give scale: mse"):
        Rtn(weighted=True).quantizer_for(Quantizer("int4 group=16"))
