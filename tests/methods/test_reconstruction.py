"""FlexRound, SignRound, Block-AP, CBQ, whole: the recipes as they are, with fewer steps, on a small llama."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from tests.tiny import tiny_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import nybble
from nybble.recipe import load_recipe, parse_recipe
from nybble.report.record import Report

LINE = "int2 group=16 symmetric=false"
SCHEME = {"targets": ["re:.*(up|down)_proj"], "weights": LINE}
#: fewer steps, at rates for them and for this model's weights, which are larger than a trained one's
SHORT: dict[str, dict[str, Any]] = {
    "flexround": {"steps": 40, "rates": {"rounding": 0.01}},
    "signround": {"steps": 40, "rates": {"rounding": 0.025, "clip": 0.025}},
    "efficientqat-ap": {"steps": 40, "rates": {"weights": 5e-3, "scales": 5e-3}},
    "cbq": {"steps": 60, "rates": {"rounding": 0.3, "scales": 1e-2}},
}


def tokens(seed: int, samples: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 300, (samples, 16), generator=generator)


@cache
def exact() -> nn.Module:
    found: nn.Module = tiny_model(dtype=torch.float32)
    return found


def quantized(name: str, **changes: Any) -> tuple[nn.Module, Report]:
    torch.set_num_threads(1)
    steps = [] if name == "rtn" else load_recipe(name).to_dict()["steps"]
    short = [without_quick({**s, **SHORT[name], **changes}) if "reconstruction" in s else s for s in steps]
    recipe = parse_recipe({"name": name, "scheme": SCHEME, "steps": short or [{"solver": "rtn"}]})
    settings = nybble.Settings(samples=64, seq_len=16, batch=16, dtype=torch.float32)
    model, report = nybble.quantize(tiny_model(dtype=torch.float32), recipe, tokens(0), settings=settings)
    return model, report


def without_quick(step: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in step.items() if key != "quick"}


@torch.no_grad()
def error(model: nn.Module, seed: int = 1) -> float:
    """Of the last block's output, relative, on tokens that calibration has not seen."""
    with torch.no_grad():
        one, other = (m(tokens(seed), output_hidden_states=True).hidden_states[-1] for m in (exact(), model))
    return float((one - other).square().sum() / one.square().sum())


@cache
def nearest() -> float:
    return error(quantized("rtn")[0])


@pytest.mark.parametrize("name", SHORT)
def test_better_than_nearest_on_what_it_has_not_seen(name: str) -> None:
    model, report = quantized(name)
    assert error(model) < 0.95 * nearest()
    rows = [row for row in report.layers if row.weights]
    for row in rows:
        assert row.bits == quantized_bits()  # nothing but codes, scales and zero points is stored
        assert row.learned is not None and row.learned["windows"]
    windows = {entry["window"] for row in rows for entry in (row.learned or {})["windows"]}
    assert windows == {"window-0000"} if name == "cbq" else {"window-0000", "window-0001"}
    curves = [entry for row in rows for entry in (row.learned or {})["windows"] if "curve" in entry]
    assert len(curves) == len(windows) and all(30 <= len(entry["curve"]) <= 40 for entry in curves)
    assert any((row.learned or {})["left_nearest"] > 0 for row in rows)


@cache
def taught() -> tuple[Any, Tensor]:
    """A llama of three blocks that has learned a language of 64 words, of which the last two decide the next; a text.

    Random blocks hardly mend what the ones before them broke, so a window of two has nothing to gain from them.
    """
    generator = torch.Generator().manual_seed(9)
    after = torch.randint(0, 64, (64, 64, 2), generator=generator)
    words = [torch.randint(0, 64, (64 * 202,), generator=generator) for _ in range(2)]
    for _ in range(14):
        rarer = (torch.rand(64 * 202, generator=generator) < 0.2).long()
        words.append(after[words[-1] % 16, words[-2] % 16, rarer])
    text = torch.stack(words, 1)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        make: Any = LlamaForCausalLM
        model = make(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, 200)
        for start in range(0, 64 * 200, 64):
            batch = text[start : start + 64]
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval().requires_grad_(False), text[64 * 200 :]


def test_cbqs_windows_of_two_lose_less_than_of_one_and_those_less_than_nearest() -> None:
    """In the last hidden state, on held-out text, after equal steps of every window (the sheet's check 4)."""
    torch.set_num_threads(1)
    model, text = taught()
    calibration, held = text[:64], text[64:]
    (learns,) = [step for step in load_recipe("cbq").to_dict()["steps"] if "reconstruction" in step]
    before: list[dict[str, Any]] = [{"transform": "cfp"}, {"solver": "rtn", "scale": "cfp"}]
    rates, lost = {"rounding": 0.1, "scales": 3e-3}, dict[int, float]()
    for window in (0, 1, 2):
        step = {**without_quick(learns), "window": window, "overlap": window - 1, "steps": 60, "rates": rates}
        steps = [*before, step] if window else [{"solver": "rtn"}]
        scheme = {"weights": "int3 channel symmetric=false"}
        recipe = parse_recipe({"name": "cbq", "scheme": scheme, "steps": steps})
        settings = nybble.Settings(samples=64, seq_len=16, batch=16, dtype=torch.float32)
        made, report = nybble.quantize(copy.deepcopy(model), recipe, calibration, settings=settings)
        entries = [entry for row in report.layers for entry in (row.learned or {}).get("windows", ())]
        assert {entry["blocks"] for entry in entries} == ({window} if window else set())
        with torch.no_grad():
            one, other = (m(held, output_hidden_states=True).hidden_states[-1] for m in (model, made))
        lost[window] = float((one - other).square().mean())
    assert lost[2] < lost[1] < 0.8 * lost[0]


def test_norms_that_learned_for_nothing_are_what_they_were() -> None:
    """In a window that went back; the model has its own layers again."""
    torch.set_num_threads(1)
    step = {"reconstruction": "mse", "weights": "frozen-codes", "norms": True, "steps": 2, "rates": {"norms": 30.0}}
    recipe = parse_recipe({"name": "worse", "scheme": SCHEME, "steps": [{"solver": "rtn"}, step]})
    settings = nybble.Settings(samples=4, seq_len=16, batch=4, dtype=torch.float32)
    model, report = nybble.quantize(tiny_model(dtype=torch.float32), recipe, tokens(0, 4), settings=settings)
    kept = {window["kept"] for row in report.layers for window in (row.learned or {}).get("windows", ())}
    assert kept == {"start"}
    before = {name: module for name, module in exact().named_modules() if "norm" in name}
    for name, module in before.items():
        found = model.get_submodule(name)
        assert type(found) is type(module) and torch.equal(found.weight, module.weight)


@cache
def quantized_bits() -> float:
    return quantized("rtn")[1].layers[0].bits


def test_gradients_of_the_likelihood_weigh_outputs() -> None:
    """The Fisher loss is fed squares of what autograd says of the blocks' outputs, batch by batch."""
    from nybble.calibration.fisher import block_gradients, log_likelihood
    from nybble.core.seeds import derive_seed
    from nybble.models.adapter import adapter_for

    model, ids = tiny_model(dtype=torch.float32), tokens(0, 5)
    names = ["model.layers.0", "model.layers.1"]
    found = dict(block_gradients(model, adapter_for(model), names, {"input_ids": ids}, batch=2, seed=3))
    assert list(found) == [0, 2, 4] and all(set(each) == set(names) for each in found.values())
    for start, gradients in found.items():
        generator = torch.Generator().manual_seed(derive_seed(3, "fisher", str(start)))
        with torch.enable_grad():
            embedded = model.get_input_embeddings()(ids[start : start + 2]).detach().requires_grad_()
            output = model(inputs_embeds=embedded, output_hidden_states=True)
            (wanted,) = torch.autograd.grad(log_likelihood(output, None, generator), output.hidden_states[1:2])
        torch.testing.assert_close(gradients[names[0]], wanted, rtol=1e-5, atol=1e-6)
        assert wanted.count_nonzero() > 0


@pytest.mark.parametrize("spill", [False, True])
def test_fisher_learns(spill: bool) -> None:
    torch.set_num_threads(1)
    step = {"reconstruction": "fisher", "weights": "flexround", "steps": 6, "rates": {"rounding": 0.01}}
    recipe = parse_recipe({"name": "weighed", "scheme": SCHEME, "steps": [step]})
    settings = nybble.Settings(samples=8, seq_len=16, batch=3, dtype=torch.float32, spill=spill)
    model, report = nybble.quantize(tiny_model(dtype=torch.float32), recipe, tokens(0, 8), settings=settings)
    assert all("output error" in row.notes[-1] for row in report.layers if row.weights)
    PACKED.setdefault("first", model.state_dict()["model.layers.1.mlp.down_proj.weight.codes"])
    assert torch.equal(PACKED["first"], model.state_dict()["model.layers.1.mlp.down_proj.weight.codes"])


PACKED: dict[str, Tensor] = {}
