"""prepare -> any loop -> convert -> a file: losses fall, scales move, and the file computes what training computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import input_ids, logits, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import nybble
from nybble.checkpoint.save import save
from nybble.core.errors import DataError, ModelError, SchemeError, UsageError
from nybble.nn.fake import FakeLayer, penalty_of
from nybble.recipe import load_recipe
from nybble.scheme import parse_scheme
from nybble.training.convert import convert
from nybble.training.prepare import learning_groups, prepare

#: scheme, parts: W4A8 in integers, and in 4-bit floats
SETTINGS: dict[str, tuple[Any, dict[str, str]]] = {
    "ste int": ({"weights": "int4 group=16 symmetric=false", "inputs": "int8 token"}, {}),
    "lsq int": (
        {"weights": "int4 channel scale=learned", "inputs": "int8 tensor static", "outputs": "int8 token"},
        {"weights": "lsq", "inputs": "lsq"},
    ),
    "ste float4": ("W4A8_E2M1_E4M3", {}),
    "lsq float4": ({"weights": "nvfp4", "inputs": "float8_e4m3fn tensor static"}, {"weights": "lsq", "inputs": "lsq"}),
}


def run(model: nn.Module) -> None:
    model(input_ids=input_ids(), use_cache=False)


def fakes(model: nn.Module) -> dict[str, FakeLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeLayer)}


def train(model: Any, steps: int = 12, rate: float = 2e-3) -> list[float]:
    """Next-token loss on one batch; every loss."""
    optimizer = torch.optim.Adam(learning_groups(model, {}), lr=rate)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=input_ids(), labels=input_ids(), use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("setting", SETTINGS)
def test_train_convert_save_load(setting: str, dtype: torch.dtype, tmp_path: Path) -> None:
    scheme, parts = SETTINGS[setting]
    model = tiny_model("llama", dtype, tie_word_embeddings=False)
    prepare(model, scheme, parts, run=run)
    assert len(fakes(model)) == 14
    before = {k: v.detach().clone() for k, v in model.state_dict().items()}
    losses = train(model)
    assert losses[-1] < 0.8 * losses[0]
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    for name, fake in fakes(model).items():
        assert f"{name}.weight.latent" in moved
        for side, learned in fake.learned():
            for found in learned.groups().values():
                assert found and any(f"{name}.{side.replace('weights', 'weight.learned')}" in key for key in moved)
    expected = logits(model)
    convert(model)
    assert not fakes(model)
    assert torch.equal(logits(model), expected)
    folder = save(model, tmp_path / "out", tiny_tokenizer())
    loaded, _ = nybble.load(folder)
    assert loaded.dtype == dtype and torch.equal(logits(loaded), expected)
    auto: Any = AutoModelForCausalLM
    assert torch.equal(logits(auto.from_pretrained(folder, dtype=dtype).eval()), expected)


def test_begins_as_the_quantized_model() -> None:
    """Before any step it computes what round-to-nearest gives."""
    scheme = {"weights": "float4_e2m1fn group=16", "inputs": "float8_e4m3fn token"}
    prepared = prepare(tiny_model(), scheme, {"weights": "lsq"})
    quantized, _ = nybble.quantize(tiny_model(), load_recipe("rtn").with_scheme(parse_scheme(scheme)))
    assert torch.equal(logits(prepared), logits(quantized))


def test_goes_on_after_an_interruption() -> None:
    scheme, parts = SETTINGS["lsq int"]
    one = prepare(tiny_model("llama", torch.float32), scheme, parts, run=run)
    train(one, 3)
    state = {k: v.clone() for k, v in one.state_dict().items()}
    train(one, 3)
    other = prepare(tiny_model("llama", torch.float32, seed=4), scheme, parts, run=run)
    other.load_state_dict(state)
    train(other, 3)
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_other_families(family: str) -> None:
    model = prepare(tiny_model(family), {"weights": "int4 group=16", "inputs": "int8 token"})
    train(model, 2)
    expected = logits(model)
    assert torch.equal(logits(convert(model)), expected)


def test_a_convolutional_network() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(),
        nn.Linear(8 * 36, 4),
    )  # fmt: skip
    x, y = torch.randn(6, 3, 8, 8), torch.randint(0, 4, (6,))
    scheme: dict[str, Any] = {
        "rules": [
            {"targets": ["Conv"], "weights": "int4 channel", "inputs": "int8 plane"},
            {"targets": ["Linear"], "weights": "int4 channel", "inputs": "uint8 tensor static symmetric=false"},
        ]
    }
    network.train()
    statistics = network[1].running_mean.clone()  # type: ignore[operator]
    model = prepare(network, scheme, {"weights": "lsq", "inputs": "ste"}, run=lambda m: m(x))
    assert model.training and torch.equal(model[1].running_mean, statistics)  # type: ignore[index]
    optimizer = torch.optim.Adam(learning_groups(model, {"scales": 1e-4}), lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss: Tensor = nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    expected = model.eval()(x)
    assert torch.equal(convert(model)(x), expected)


def test_linear_means_convolutions_where_quantize_takes_it_so() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4))
    assert set(fakes(prepare(network, {"weights": "int4 channel"}))) == {"0", "2"}


def test_learning_groups() -> None:
    scheme, parts = SETTINGS["lsq int"]
    model = prepare(tiny_model("llama", torch.float32), scheme, parts, run=run)
    groups = learning_groups(model, {"scales": 1e-4, "inputs.scales": 1e-6})
    rates = {id(p): group.get("lr") for group in groups for p in group["params"]}
    assert sorted(rates) == sorted({id(p) for p in model.parameters()})
    for fake in fakes(model).values():
        named = fake.groups()
        assert {rates[id(p)] for p in named["weights.scales"]} == {1e-4}
        assert {rates[id(p)] for p in named["inputs.scales"]} == {1e-6}
        assert rates[id(fake.weight.latent)] is None
    decays = {id(p): group.get("weight_decay") for group in learning_groups(model, {}) for p in group["params"]}
    for fake in fakes(model).values():
        assert {decays[id(p)] for p in fake.groups()["weights.scales"]} == {0.0}
        assert decays[id(fake.weight.latent)] is None
    with pytest.raises(UsageError, match="no layer learns 'clip'"):
        learning_groups(model, {"clip": 1e-2})


def test_what_is_frozen_stays_frozen() -> None:
    """Weights and biases of layers, a tied table, fused experts; scales learn beside them."""
    for family in ("llama", "qwen3_moe"):
        model, whole = (tiny_model(family, torch.float32) for _ in range(2))
        scheme = {"targets": ["Linear", "Embedding"], "weights": "int4 channel"}
        prepare(model.requires_grad_(False), scheme, {"weights": "lsq"})
        left = {name for name, p in model.named_parameters() if p.requires_grad}
        assert left and all(name.endswith("learned.held.scale") for name in left)
        (group,) = learning_groups(model, {"scales": 1e-3})
        assert len(group["params"]) == len(left)
        kept = "model.layers.1.mlp.up_proj.weight" if family == "llama" else "model.layers.1.mlp.experts.down_proj"
        whole.get_parameter(kept).requires_grad_(False)
        prepare(whole, scheme)
        still = {name for name, p in whole.named_parameters() if not p.requires_grad}
        assert still and all(name.startswith(kept) for name in still)
    with pytest.raises(UsageError, match="nothing in this model trains: all its parameters are frozen"):
        learning_groups(prepare(tiny_model().requires_grad_(False), {"weights": "int4 channel"}), {})


def test_rounding_is_trained_on_weights_that_stay(tmp_path: Path) -> None:
    """AdaRound: the penalty is in the loss, V moves, weights don't; the packed model is the eval one."""
    model = prepare(tiny_model("llama", torch.float32), {"weights": "int4 channel"}, {"weights": "adaround"})
    assert not any(fake.weight.latent.requires_grad for fake in fakes(model).values())
    before = {name: fake.weight.latent.detach().clone() for name, fake in fakes(model).items()}
    optimizer = torch.optim.AdamW(learning_groups(model, {"rounding": 0.1}), lr=1e-4)
    target = logits(tiny_model("llama", torch.float32))
    start = penalty_of(model, 1.0)
    for step in range(6):
        optimizer.zero_grad()
        loss: Tensor = (model.train()(input_ids=input_ids()).logits - target).square().mean()
        (loss + penalty_of(model, step / 6)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert all(torch.equal(fake.weight.latent, before[name]) for name, fake in fakes(model).items())
    assert penalty_of(model, 1.0) < 0.9 * start
    expected = logits(model.eval())
    convert(model)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)  # type: ignore[operator]  # transformers' own way to a file
    auto: Any = AutoModelForCausalLM
    assert torch.equal(logits(auto.from_pretrained(tmp_path).eval()), expected)


def test_refusals() -> None:
    with pytest.raises(SchemeError, match=r"learned: weights is the name of a learned part.*; got None"):
        prepare(tiny_model(), "W8A8", {"weights": None})  # type: ignore[dict-item]
    scheme: Any
    for scheme, learned, error, words in (
        ({"weights": "int4 channel", "inputs": "int8 token"}, {"inputs": "lsq"}, SchemeError, "q_proj.*lsq.*static"),
        ({"weights": "int4 rank1"}, {"weights": "lsq"}, SchemeError, "q_proj.*lsq.*rank1"),
        ({"weights": "int4 group=24"}, {}, UsageError, "q_proj.*group=24 does not divide"),
        ({"weights": "int4 channel", "ignore": []}, {}, SchemeError, "lm_head: its weight is tied to the embeddings"),
        ({"targets": ["Lineal"], "weights": "int4 channel"}, {}, SchemeError, "'Lineal' matches no module"),
        ({"weights": "int4 channel", "inputs": "int8 tensor static"}, {}, UsageError, "static inputs begin.*give run"),
        ({"weights": "int4 channel"}, {"inpts": "ste"}, UsageError, "'inpts'.*inputs"),
        ({"weights": "int4 channel"}, {"weights": "lsqq"}, UsageError, "unknown learned part"),
        ({"weights": "int4 channel"}, {"matmuls": "lsq"}, UsageError, "a part for matmuls, and.*none, but weights"),
        (
            {"inputs": "int8 token", "kv": "int4 token"},
            {"kv": "ste", "weights": "ste"},
            UsageError,
            "weights.*inputs, kv",
        ),
    ):
        model = tiny_model()
        with pytest.raises(error, match=words):
            prepare(model, scheme, learned)
        assert not fakes(model)


def test_bad_values() -> None:
    static = {"weights": "int4 channel", "inputs": "int8 tensor static"}
    with pytest.raises(ModelError, match=r"run never called .*q_proj"):
        prepare(tiny_model(), static, run=lambda model: None)
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.up_proj: the weight holds 1 NaN"):
        prepare(model, {"weights": "int4 channel"})
    assert not fakes(model)
    with pytest.raises(UsageError, match="nothing in this model was prepared"):
        convert(tiny_model())
    diverged = prepare(tiny_model(), {"weights": "int4 channel"}, {"weights": "lsq"})
    with torch.no_grad():
        next(iter(fakes(diverged).values())).weight.latent[0, 0] = torch.inf
    with pytest.raises(DataError, match=r"layers\.0\.self_attn\.q_proj: weight.latent holds 1 NaN or Inf"):
        convert(diverged)
    assert len(fakes(diverged)) == 14


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing does so
@pytest.mark.parametrize("setting", ["lsq int", "ste float4"])
def test_a_step_is_compiled_whole(setting: str) -> None:
    """Forward and backward of a network in training are one graph each, with the same loss and gradients."""
    scheme, parts = SETTINGS[setting]
    model = prepare(tiny_model("llama", torch.float32, num_hidden_layers=1), scheme, parts, run=run).train()

    def forward(ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    found = []
    for run_it in (forward, torch.compile(forward, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        loss = run_it(input_ids())
        loss.backward()  # type: ignore[no-untyped-call]
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (loss, gradients), (other, others) = found
    assert torch.equal(loss, other)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)
