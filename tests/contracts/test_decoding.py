"""A token in one call through a packed decoder: the numbers of its modules."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts import compiled
from tests.tiny import given, save_tiny, tiny_model
from torch import Tensor, nn

import nybble
from nybble.kernels import cpu_decoding, cpu_integers, cpu_products
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.decoding import decoding_of, plan_of
from nybble.nn.linear import QuantLinear
from nybble.nn.swap import hold_dense, set_module
from nybble.pipelines import generate
from nybble.pipelines.load import load_with_origin
from nybble.quantizer import Quantizer

WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
ISAS = [isa for isa in (0, 2, 3, 4) if isa <= (0 if (made := compiled.library()) is None else made.nybble_isa())]
pytestmark = compiled.needed


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights too."""
    monkeypatch.setattr(cpu_products, "SMALL", 1)


def packed(family: str, weights: str, inputs: str = "", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    model = tiny_model(family, dtype, **{**WIDE, "sliding_window": None, **changes})
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5)  # norms
    for name, old in list(model.model.layers.named_modules()):
        if isinstance(old, nn.Linear):
            found: Any = old.bias  # torch calls it a tensor
            bias = None if found is None else found.normal_()
            own = ActivationQuantizer(Quantizer(inputs)) if inputs else None
            table = Quantizer(weights).quantize(old.weight.float())
            set_module(model, f"model.layers.{name}", QuantLinear(table, bias, own).standing_for(dtype))
    return model


@torch.no_grad()
def by_modules(model: Any, ids: Tensor, behind: int) -> Tensor:
    """Logits of the tokens from ``behind`` on, one at a time, [tokens, sequences, vocabulary]."""
    found = model(input_ids=ids[:, :behind], use_cache=True)
    cache, rows = found.past_key_values, []
    for at in range(behind, ids.shape[1]):
        rows.append(model(input_ids=ids[:, at : at + 1], use_cache=True, **given(model, cache)).logits[:, -1])
    return torch.stack(rows)


def in_calls(model: Any, ids: Tensor, behind: int) -> Tensor:
    decoding = decoding_of(model, *ids.shape)
    assert decoding is not None
    decoding.read(ids[:, :behind])
    return torch.stack([decoding.step(ids[:, at]) for at in range(behind, ids.shape[1])])


def far(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


IDS = torch.randint(3, 300, (3, 15), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("isa", ISAS)
def test_the_numbers_are_those_of_the_modules(family: str, isa: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 but for the order of sums: some thousand of them in two layers, each within 2^-24 of its terms."""
    monkeypatch.setattr(cpu_products, "_ISA", isa)
    model = packed(family, "int4 group=32 symmetric=false")
    assert far(in_calls(model, IDS, 6), by_modules(model, IDS, 6)) < 2e-5
    assert far(in_calls(model, IDS[:1], 6), by_modules(model, IDS[:1], 6)) < 2e-5


@pytest.mark.parametrize(
    "inputs", ["int8 token", "int8 token symmetric=false", "nvfp4", "float8_e4m3fn token", "mxfp8"]
)
def test_inputs_are_rounded(inputs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that another order of sums moves over a tie is rounded otherwise: a few codes in thousands."""
    monkeypatch.setattr(cpu_integers, "_LEAST", 0)
    model = packed("llama", "int8 channel", inputs)
    plain = packed("llama", "int8 channel")
    rounded = by_modules(model, IDS, 6)
    own = far(rounded, by_modules(plain, IDS, 6))
    assert far(in_calls(model, IDS, 6), rounded) < 0.2 * own


@pytest.mark.parametrize(("dtype", "isa"), [(torch.float16, 3), *((torch.bfloat16, isa) for isa in ISAS[-2:])])
def test_sixteen_bits_lose_no_more_than_in_the_modules(
    dtype: torch.dtype, isa: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_products, "_ISA", isa)
    model = packed("llama", "int4 group=32", dtype=dtype)
    wide = packed("llama", "int4 group=32", dtype=dtype).float()
    truth = by_modules(wide, IDS, 6)
    assert far(in_calls(model, IDS, 6), truth) < 1.3 * far(by_modules(model, IDS, 6), truth)


def test_threads_change_nothing() -> None:
    model, before = packed("llama", "int4 group=32"), torch.get_num_threads()
    torch.set_num_threads(1)
    alone = in_calls(model, IDS, 6)
    torch.set_num_threads(2)
    shared = in_calls(model, IDS, 6)
    torch.set_num_threads(before)
    assert torch.equal(alone, shared)


@pytest.mark.parametrize("why", ["family", "hook", "window", "static", "dense", "float", "activation", "head"])
def test_what_the_modules_have_to_do_they_do(why: str) -> None:
    changes: dict[str, Any] = {
        "window": {"sliding_window": 6},
        "activation": {"hidden_act": "gelu"},
        "head": {"head_dim": 24},
    }
    family = {"family": "smollm3", "window": "mistral"}.get(why, "llama")
    model = packed(family, "int4 group=32", "int8 token" if why == "static" else "", **changes.get(why, {}))
    attention = model.model.layers[1].self_attn
    if why == "hook":
        attention.register_forward_hook(lambda *_: None)
    elif why == "static":
        static = Quantizer("int8 tensor static")
        attention.o_proj.inputs = ActivationQuantizer(static, static.fit(torch.randn(4)))
    elif why == "dense":
        hold_dense(model, torch.float32)
    elif why == "float":
        attention.o_proj = nn.Linear(128, 128)
    assert decoding_of(model, 1, 8) is None
    assert plan_of(packed("llama", "int4 group=32")) is not None


def test_what_comes_in_stays() -> None:
    """A row of a table, say, which a step must not write to."""
    plan = plan_of(packed("llama", "int4 group=32"))
    assert plan is not None
    steps = cpu_decoding.steps(plan, 2, 4)
    x = torch.randn(2, 128)
    kept = x.clone()
    assert steps is not None and not torch.equal(steps(x, 0), x) and torch.equal(x, kept)


def test_no_room_is_an_error() -> None:
    decoding = decoding_of(packed("llama", "int4 group=32"), 1, 8)
    assert decoding is not None
    decoding.read(IDS[:1, :7])
    decoding.step(IDS[:1, 7])
    with pytest.raises(RuntimeError, match="have room"):
        decoding.step(IDS[:1, 8])


def test_generate_writes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = str(save_tiny(tmp_path / "float", **WIDE, dtype=torch.float32))
    nybble.quantize(place, "rtn", weights="int4 group=32", out=tmp_path / "out")
    monkeypatch.setattr(generate, "load_with_origin", partial(load_with_origin, dtype=torch.float32))
    calls: list[int] = []
    steps = cpu_decoding.CpuSteps.__call__

    def counted(*given: Any) -> Tensor:
        calls.append(1)
        return steps(*given)

    monkeypatch.setattr(cpu_decoding.CpuSteps, "__call__", counted)
    text = generate.generate(str(tmp_path / "out"), "ba be bi", max_new_tokens=12)
    assert calls, text
    monkeypatch.setattr(generate, "decoding_of", lambda *_: None)
    assert generate.generate(str(tmp_path / "out"), "ba be bi", max_new_tokens=12) == text


@torch.no_grad()
def test_what_is_no_number_stays_so() -> None:
    """An infinite embedding under inputs with a scale of the whole tensor: NaN from there on, as modules have it."""
    model = packed("llama", "int4 group=32", "nvfp4")
    model.get_input_embeddings().weight[7] = torch.inf
    decoding = decoding_of(model, 1, 8)
    assert decoding is not None
    ids = torch.tensor([[1, 2, 3, 7, 4]])
    decoding.read(ids[:, :3])
    found = torch.stack([decoding.step(ids[:, at]) for at in (3, 4)])
    assert found.isnan().all() and by_modules(model, ids, 3).isnan().all()
