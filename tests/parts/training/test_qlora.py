"""QLoRA: what a faithful implementation has to show, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import input_ids, logits, tiny_model
from torch import nn

import nybble
from nybble.checkpoint.account import inspect
from nybble.checkpoint.save import save
from nybble.core.errors import FileError, ModelError, UsageError
from nybble.nn.linear import QuantLinear
from nybble.pipelines.request import build_recipe
from nybble.quantizer import Quantizer
from nybble.scheme import parse_scheme
from nybble.training.methods import METHODS, Given, Place
from nybble.training.methods.qlora import QloraOptions

peft = pytest.importorskip("peft", reason="needs PEFT, which nybble's extra 'train' brings")
adapters = pytest.importorskip("nybble.training.adapters")

# PEFT asks transformers in words that its newest release calls old; older ones know no others.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")

QLORA = METHODS.get("qlora")
PROJECTIONS = ("q_proj", "v_proj")


def packed(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    model = tiny_model(dtype=dtype, **changes)
    nybble.quantize(model, build_recipe("rtn", weights="nf4-bnb-dq"))
    return model


def given(start: Path | None = None, **options: Any) -> Given:
    return Given(options=QloraOptions(**options), scheme=parse_scheme({"weights": "nf4-bnb-dq"}), start=start)


def at(folder: Path) -> Place:
    return Place(folder=folder, base="base", dtype=torch.float32)


def attached(model: Any, **options: Any) -> Any:
    return QLORA.attach(model, given(**{"rank": 4, "dropout": 0.0, **options}))


def loss_of(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=input_ids(), labels=input_ids(), use_cache=False).loss
    return found


def fitted(model: Any, steps: int = 12) -> float:
    """The loss behind some updates on one batch."""
    ours = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(ours, lr=3e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return float(loss_of(model).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_at_first_it_is_the_packed_model_and_its_codes_stay(dtype: torch.dtype) -> None:
    model = packed(dtype)
    before, held = logits(model), {name: t.clone() for name, t in model.state_dict().items()}
    found = attached(model)
    assert torch.equal(logits(found), before)
    fitted(found.train(), 2)
    assert not torch.equal(logits(found), before)
    now = {name.replace(".base_layer", ""): t for name, t in found.get_base_model().state_dict().items()}
    assert all(torch.equal(now[name], t) for name, t in held.items())
    with found.disable_adapter():
        assert torch.equal(logits(found), before)


def test_adapters_alone_train_and_there_are_as_many_as_there_should_be() -> None:
    model = packed()
    layers: list[Any] = [m for m in model.modules() if isinstance(m, QuantLinear)]
    found = attached(model, rank=5)
    loss_of(found).backward()  # type: ignore[no-untyped-call]
    names = {name for name, p in found.named_parameters() if p.grad is not None}
    assert names == {name for name, p in found.named_parameters() if ".lora_" in name} and len(names) == 28
    count = sum(p.numel() for p in found.parameters() if p.requires_grad)
    assert count == sum(5 * (m.in_features + m.out_features) for m in layers)
    parts = QLORA.parts(found)
    assert parts["adapters"] == 4 * count
    stored = sum(m.weight.qtensor().nbytes() for m in layers)
    assert parts["base, packed"] == stored + sum(4 * m.bias.numel() for m in layers if m.bias is not None)
    everything = {id(t): t.nbytes for t in (*found.parameters(), *found.buffers())}
    assert sum(parts.values()) == sum(everything.values())


def test_gradients_are_those_of_float64_differences() -> None:
    """Of A, B and what enters, through a weight that is dequantized on the way; and of a whole model's loss."""
    generator = torch.Generator().manual_seed(0)
    layer = QuantLinear(Quantizer("nf4-bnb-dq").quantize(torch.randn(12, 16, generator=generator)), torch.zeros(12))
    config = peft.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
    found = peft.get_peft_model(nn.Sequential(layer), config).double()
    ours = {name: p.detach().clone().requires_grad_() for name, p in found.named_parameters() if p.requires_grad}
    x = torch.randn(5, 16, dtype=torch.float64, generator=generator).requires_grad_()

    def run(x: torch.Tensor, *values: torch.Tensor) -> Any:
        return torch.func.functional_call(found, dict(zip(ours, values, strict=True)), (x,))

    assert len(ours) == 2 and torch.autograd.gradcheck(run, (x, *ours.values()))


def test_the_gradient_of_a_whole_loss_with_checkpointing() -> None:
    """Differences as exact as norms and the loss let them be, which transformers calculates in float32."""
    found = attached(packed(), rank=3).double().train()
    found.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ours = [p for p in found.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    for p in ours:
        p.data = torch.randn(p.shape, dtype=p.dtype, generator=generator) / 8
    loss_of(found).backward()  # type: ignore[no-untyped-call]
    step = 1e-3
    for p in ours:
        assert p.grad is not None and p.grad.dtype == torch.float64
        way = p.grad / p.grad.norm()
        ends = []
        for move in (step, -2 * step):
            p.data.add_(way, alpha=move)
            ends.append(float(loss_of(found).detach()))
        p.data.add_(way, alpha=step)
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(p.grad.norm()), rel=5e-3)


def test_all_layers_come_close_to_float_and_two_projections_do_not() -> None:
    small: dict[str, Any] = {"seed": 5}
    every = fitted(attached(packed(**small)))
    two = fitted(attached(packed(**small), targets=PROJECTIONS))
    base = tiny_model(dtype=torch.float32, **small).requires_grad_(False)
    lora = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    float_lora = fitted(peft.get_peft_model(base, lora))
    start = float(loss_of(packed(**small)).detach())
    assert abs(every - float_lora) < 0.05 * (start - float_lora)
    assert two - every > 0.2 * (start - every)


def test_saved_loaded_and_merged(tmp_path: Path) -> None:
    found = attached(packed())
    fitted(found, 3)
    QLORA.save(found.eval(), at(tmp_path / "adapter"))
    again = adapters.load_adapter(packed(), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(found)) and not again.training
    assert not any(p.requires_grad for p in again.parameters())
    on = QLORA.attach(packed(), given(tmp_path / "adapter"))  # its own rank, not the options'
    assert {p.shape for p in on.parameters() if p.requires_grad} == {
        p.shape for p in found.parameters() if p.requires_grad
    }
    merged = QLORA.merged(again)
    assert not any(".lora_" in name for name, _ in merged.named_parameters())
    assert torch.allclose(logits(merged), logits(found), atol=1e-4, rtol=1e-4)
    layers: list[Any] = [m for m in merged.modules() if isinstance(m, QuantLinear)]
    assert {m.weight.qtensor().kind for m in layers} == {"low-rank-sum"}
    rows = inspect(save(merged, tmp_path / "merged"))["formats"]
    assert sum(row["weights"] for row in rows) == len(layers)
    for row in rows:  # what is under the adapter, and the adapter
        assert row["format"].startswith("nf4 flat=64 ")
        assert row["format"].endswith(" and factors of rank 4 (an adapter merged, or lorc)")


def test_a_head_with_an_adapter_comes_back_and_names_are_written_in_order(tmp_path: Path) -> None:
    found = attached(packed(tie_word_embeddings=False), targets=("v_proj", "lm_head", "k_proj", "q_proj"))
    fitted(found, 3)
    QLORA.save(found.eval(), at(tmp_path / "adapter"))
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["k_proj", "lm_head", "q_proj", "v_proj"]  # a set's order differs in each run
    again = adapters.load_adapter(packed(tie_word_embeddings=False), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(found))
    assert torch.allclose(logits(QLORA.merged(again)), logits(found), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")  # of PEFT, before ours
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_layer_that_shares_its_weight_takes_no_adapter(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name} shares its weight with .*can't be merged"):
        attached(packed(tie_word_embeddings=True), targets=("q_proj", name))


def test_a_target_that_names_no_layer_is_refused_beside_one_that_does() -> None:
    with pytest.raises(ModelError, match="no layer's name ends in foo_proj, proj;"):
        attached(packed(), targets=("q_proj", "foo_proj", "proj"))


def test_foreign_adapters_are_refused_and_the_model_stays(tmp_path: Path) -> None:
    QLORA.save(attached(packed(hidden_size=64)), at(tmp_path / "wide"))
    QLORA.save(attached(packed(num_hidden_layers=3)), at(tmp_path / "deep"))
    QLORA.save(attached(packed()), at(tmp_path / "kind"))
    config = json.loads((tmp_path / "kind" / "adapter_config.json").read_text())
    (tmp_path / "kind" / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    QLORA.save(attached(packed()), at(tmp_path / "broken"))
    weights = tmp_path / "broken" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    (tmp_path / "empty").mkdir()
    model = packed()
    before, names = logits(model), {name for name, _ in model.named_modules()}
    for folder, error, message in [
        ("wide", ModelError, r"of another model: .* is \(64, 4\), and here \(32, 4\)"),
        ("deep", ModelError, "of another model: it has .*layers.2"),
        ("kind", ModelError, "kind IA3"),
        ("broken", FileError, "adapter_model.safetensors"),
        ("empty", FileError, "holds no adapter: adapter_config.json is missing"),
    ]:
        with pytest.raises(error, match=message):
            adapters.load_adapter(model, tmp_path / folder)
        assert torch.equal(logits(model), before) and {name for name, _ in model.named_modules()} == names, folder


def test_every_adapter_has_the_options() -> None:
    model = attached(packed(), rank=3, alpha=6.0, dropout=0.25)
    layers = [m for m in model.modules() if hasattr(m, "lora_dropout")]
    assert layers and {(m.r["default"], m.scaling["default"], m.lora_dropout["default"].p) for m in layers} == {
        (3, 2.0, 0.25)
    }


def test_what_cannot_be_adapted_is_refused() -> None:
    with pytest.raises(ModelError, match="no linear layer of this LlamaForCausalLM is packed"):
        attached(tiny_model())
    model = packed()
    with pytest.raises(ModelError, match="targets nowhere"):
        attached(model, targets=("nowhere",))
    assert not hasattr(model, "peft_config")
    for options in ({"rank": 0}, {"dropout": 1.0}, {"alpha": 0.0}, {"targets": ()}):
        with pytest.raises(UsageError):
            QloraOptions(**options)
