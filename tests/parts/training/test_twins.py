"""Twins of all kinds: embeddings, tied heads, attention's operands, KV caches, fused experts.

What training computes is what is packed, saved and loaded, bit for bit; gradients are those of torch and of formulas.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.tiny import given, input_ids, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from torch.nn import functional

import nybble
from nybble.checkpoint.save import save
from nybble.core.errors import DataError, ModelError, SchemeError, UsageError
from nybble.kv_format import fixed_scale
from nybble.learned import make_part
from nybble.nn.attention import CACHED, PART, attentions, quantized_attention
from nybble.nn.embedding import QuantEmbedding, TiedEmbedding, TiedHead
from nybble.nn.fake_attention import FakeCache, FakeOperands
from nybble.nn.fake_embedding import FakeEmbedding, FakeTiedEmbedding, FakeTiedHead
from nybble.nn.fake_experts import FakeExperts
from nybble.nn.kv_model import recorded_kv
from nybble.nn.twin import Twin
from nybble.quantizer import Quantizer
from nybble.training.convert import convert
from nybble.training.prepare import learning_groups
from nybble.training.prepare import prepare as prepared
from nybble.training.unprepare import float_values

LINEAR = {"targets": ["Linear"], "weights": "int4 channel", "inputs": "int8 token"}
TABLE = {"targets": ["re:.*(shared|embed_tokens|word_embeddings)"], "weights": "int4 channel"}
PRODUCTS = {"matmuls": "int4 tensor static probabilities=(uint4 tensor static)"}
BART: dict[str, Any] = {
    "vocab_size": 300, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "scale_embedding": True,
}  # fmt: skip
BERT: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip
ELASTIC = "binary tensor static scale=elastic"
BITS = {"matmuls": f"{ELASTIC} probabilities=(uint1 tensor static scale=elastic)"}
BIT = {"weights": make_part("statistics", {"center": "tensor", "raw": True}), "inputs": "elastic", "matmuls": "elastic"}
TBT = {
    "weights": make_part("statistics", {"center": "block", "mask": 1.0}),
    "inputs": make_part("elastic", {"threshold": "none"}),
}
TERNARY = {"weights": "ternary channel scale=max-entropy", "inputs": "ternary tensor static scale=elastic"}
THREE = {"matmuls": "ternary tensor static scale=elastic probabilities=(uternary tensor static scale=elastic)"}
#: family, scheme, parts
CASES: dict[str, tuple[str, Any, Any]] = {
    "tied table, products, cache": (
        "llama", {"rules": [TABLE, LINEAR, PRODUCTS], "kv": "int4 token"}, {"weights": "lsq", "matmuls": "lsq"},
    ),
    "scaled table, calibrated cache": (
        "gemma2", {"rules": [{**TABLE, "weights": "nvfp4"}], "kv": "float8_e4m3fn tensor static"}, {"kv": "lsq"},
    ),
    "windows, newest tokens": ("mistral", {"kv": "keys=(int4 group=4) values=(int2 token) residual=2"}, {}),
    "cache of one layer": ("qwen3", {"rules": [{"targets": ["re:.*1.self_attn"], "kv": "int4 token"}, LINEAR]}, {}),
    "experts": ("mixtral", {"targets": ["Experts"], "weights": "int4 group=8"}, {"weights": "lsq"}),
    "dynamic products": ("opt", {"rules": [{"matmuls": "int4 token probabilities=(uint4 token)"}, LINEAR]}, {}),
    "encoder and decoder": ("bart", {"rules": [TABLE, LINEAR, PRODUCTS], "kv": "int4 token"}, {"matmuls": "lsq"}),
    "encoder": ("bert", {"rules": [TABLE, LINEAR, PRODUCTS]}, {"weights": "lsq", "matmuls": "lsq"}),
    "BiT": (
        "bert",
        {
            "rules": [
                {**TABLE, "weights": "binary channel scale=mean"},
                {
                    "targets": ["re:.*[0-9].output.dense"],
                    "weights": "binary tensor scale=mean",
                    "inputs": "uint1 tensor static scale=elastic",
                },
                {"targets": ["Linear"], "weights": "binary tensor scale=mean", "inputs": ELASTIC},
                BITS,
            ],
            "ignore": ["classifier"],
        },
        BIT,
    ),
    "TBT": (
        "bart",
        {"rules": [{**TABLE, "weights": TERNARY["weights"]}, {"targets": ["Linear"], **TERNARY}, THREE]},
        {**TBT, "matmuls": make_part("elastic", {"threshold": "none"})},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 3) -> Any:
    if family not in ("bart", "bert"):
        return tiny_model(family, dtype, seed)
    torch.manual_seed(seed)
    config: Any = transformers.AutoConfig.for_model(family, **(BART if family == "bart" else BERT))
    auto: Any = transformers.AutoModelForSeq2SeqLM
    if family == "bert":
        auto = transformers.AutoModelForSequenceClassification
    model = auto.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def prepare(model: Any, scheme: Any, parts: Any = None, run: Any = None) -> Any:
    """As nybble's; tests ask models for what their classes have."""
    return prepared(model, scheme, parts, run=run)


def batch(model: Any) -> dict[str, Tensor]:
    """Two sequences, the second padded."""
    ids, mask = input_ids(), torch.ones(2, 12, dtype=torch.long)
    left = not isinstance(model, transformers.BertForSequenceClassification)
    padded = slice(0, 3) if left and not model.config.is_encoder_decoder else slice(9, 12)
    ids[1, padded], mask[1, padded] = 0, 0
    more = {"decoder_input_ids": input_ids().flip(1)} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


@torch.no_grad()
def answer(model: Any, cached: bool = True) -> Tensor:
    cache = {"use_cache": cached} if not isinstance(model, transformers.BertForSequenceClassification) else {}
    found: Tensor = model(**batch(model), **cache).logits
    return found


def seen_before(model: Any, cache: Any) -> dict[str, Any]:
    """The cache of the tokens before, if there are any."""
    return {} if cache is None else given(model, cache)


def run(model: Any) -> None:
    answer(model, cached=False)


def train(model: Any, steps: int = 2) -> None:
    optimizer = torch.optim.Adam(learning_groups(model, {}), lr=2e-3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss: Any = functional.cross_entropy(model(**batch(model)).logits.flatten(0, -2).float(), target(model))
        loss.backward()
        optimizer.step()
    model.eval()


def target(model: Any) -> Tensor:
    return torch.tensor([0, 2]) if isinstance(model, transformers.BertForSequenceClassification) else torch.arange(24)


def twins(model: nn.Module) -> dict[str, Twin]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Twin)}


BOTH = ("tied table, products, cache", "scaled table, calibrated cache")


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.float32) for case in CASES), *((case, torch.bfloat16) for case in BOTH)]
)
def test_training_packed_saved_and_loaded(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family, scheme, parts = CASES[case]
    model = prepare(build(family, dtype), scheme, parts, run=run)
    begin = {name: value.clone() for name, value in model.state_dict().items()}
    train(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, twin in twins(model).items():  # whatever learns has moved
        moved = {id(p): not torch.equal(p, begin[f"{name}.{key}"]) for key, p in twin.named_parameters()}
        learns = {key: [p for p in found if p.requires_grad] for key, found in twin.groups().items()}
        assert all(any(moved[id(p)] for p in found) for found in learns.values() if found), (name, [*learns])
    expected = answer(model)
    assert torch.equal(answer(model, cached=False), expected)  # a cache that trains stores nothing
    again = prepare(build(family, dtype, seed=5), scheme, parts, run=run)
    assert not torch.equal(answer(again), expected)
    again.load_state_dict(state)
    assert torch.equal(answer(again), expected)
    convert(model)
    assert not twins(model) and torch.equal(answer(model), expected)
    folder = save(model, tmp_path / "out", tiny_tokenizer())
    for found in (nybble.load(folder)[0], type(model).from_pretrained(folder, dtype=dtype).eval()):
        assert found.dtype == dtype and torch.equal(answer(found), expected)
        assert recorded_kv(found) == recorded_kv(model)


def test_what_stands_where() -> None:
    bart = prepare(build("bart"), {"rules": [TABLE, PRODUCTS], "kv": "int4 token"}, run=run)
    assert not bart.all_tied_weights_keys
    bart.tie_weights()  # as transformers does at times; it finds nothing to tie
    found = twins(bart)
    assert isinstance(found["model.shared"], FakeEmbedding)
    assert isinstance(found["model.encoder.embed_tokens"], FakeTiedEmbedding)
    assert isinstance(found["model.decoder.embed_tokens"], FakeTiedEmbedding)
    assert isinstance(found["lm_head"], FakeTiedHead)
    assert len([n for n, p in bart.named_parameters(remove_duplicate=False) if p.shape == (300, 32)]) == 1
    caches = {name for name, twin in found.items() if isinstance(twin, FakeCache)}
    names = {f"model.decoder.layers.{i}.{part}.{CACHED}" for i in range(2) for part in ("self_attn", "encoder_attn")}
    assert caches == names  # and no encoder's
    operands = {name for name, twin in found.items() if isinstance(twin, FakeOperands)}
    assert operands == {f"{name}.{PART}" for name, _ in attentions(bart)} and len(operands) == 5
    convert(bart)
    assert isinstance(bart.get_input_embeddings(), QuantEmbedding) and isinstance(bart.lm_head, TiedHead)
    assert isinstance(bart.model.decoder.embed_tokens, TiedEmbedding)
    assert str(recorded_kv(bart)) == "int4 token"
    one = prepare(build("qwen3"), CASES["cache of one layer"][1])
    assert [n for n, twin in twins(one).items() if isinstance(twin, FakeCache)] == ["model.layers.1.self_attn.cached"]


@pytest.mark.parametrize("case", ["encoder and decoder", "experts", "tied table, products, cache"])
def test_a_float_model_goes_on_from_a_prepared_one(case: str) -> None:
    """Every name that the float model has, no other, and what was trained under it."""
    family, scheme, parts = CASES[case]
    model = prepare(build(family), scheme, parts, run=run)
    train(model, 1)
    fresh = build(family, seed=5)
    fresh.load_state_dict(float_values(model))
    again = prepare(fresh, scheme, parts, run=run)
    for name, twin in twins(again).items():
        for mine, other in zip(twin.weights(), model.get_submodule(name).weights(), strict=True):
            assert torch.equal(mine.latent, other.latent), name
    assert all(
        torch.equal(p, model.state_dict()[n]) for n, p in again.named_parameters() if "latent" in n or "norm" in n
    )


# ------------------------------------------------------------------------------------------------ embeddings
def test_gradients_of_a_tied_table_add_up() -> None:
    """Straight through, they are torch's own for a tied model whose table holds the rounded values."""
    model, plain = build("llama"), build("llama")
    line = Quantizer("int4 channel")
    with torch.no_grad():
        plain.model.embed_tokens.weight.copy_(line.fake_quantize(plain.model.embed_tokens.weight))
    prepare(model, {"rules": [{**TABLE, "weights": str(line)}]}).train()
    for each in (model, plain):
        loss: Any = functional.cross_entropy(each(input_ids=input_ids()).logits.flatten(0, 1), torch.arange(24))
        loss.backward()
    found, expected = model.model.embed_tokens.weight.latent.grad, plain.lm_head.weight.grad
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert (expected[torch.unique(input_ids())].norm(dim=1) > 2 * expected.norm(dim=1).median()).all()  # of both uses


@pytest.mark.parametrize("line", ["int4 channel", "mxfp4", "nvfp4", "int4 tensor", "nf4 flat=64"])
@pytest.mark.parametrize("training", [True, False])
def test_rows_that_are_needed(line: str, training: bool) -> None:
    """Where rows stand alone only those that are looked up are rounded; values and gradients are the whole table's."""
    table, ids = torch.randn(50, 32), torch.tensor([[3, 0, 3], [49, 7, 0]])
    seen: list[int] = []
    learned = make_part("ste", {}).make(Quantizer(line), table).train(training)
    learned.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    like = nn.Embedding(50, 32, padding_idx=0, _weight=table)
    twin = FakeEmbedding(like, learned).train(training)
    found = twin(ids)
    assert seen == [6 if line in ("int4 channel", "mxfp4") else 50]
    whole = functional.embedding(ids, learned(twin.weight.latent), 0)
    assert torch.equal(found, whole)
    if training:
        weights = torch.randn(found.shape)
        (gradient,) = torch.autograd.grad((found * weights).sum(), twin.weight.latent)
        (expected,) = torch.autograd.grad((whole * weights).sum(), twin.weight.latent)
        torch.testing.assert_close(gradient, expected)
        assert (gradient[0] == 0).all() and (gradient[3] != 0).any()


# ------------------------------------------------------------------------------------------------ operands
def attention_twin(family: str = "llama") -> tuple[Any, FakeOperands]:
    model = prepare(build(family), {"rules": [PRODUCTS]}, {"matmuls": "lsq"}, run=run)
    _, module = next(iter(attentions(model)))
    part = module.get_submodule(PART)
    assert isinstance(part, FakeOperands)
    return module, part.train()


def test_gradients_of_operands_by_finite_differences() -> None:
    """Of the surrogate in which every operand has a fixed rounding error: in float64, by central differences."""
    module, part = attention_twin()
    generator = torch.Generator().manual_seed(0)
    scales: list[Any] = [part.get_parameter(f"{name}.held.scale").detach() for name in ("query", "key", "value")]
    states = [torch.rand(2, heads, 5, 8, generator=generator) * 2 - 1 for heads in (4, 2, 2)]
    states = [0.9 * 7 * x * scale for x, scale in zip(states, scales, strict=True)]  # where nothing is clipped
    residue: dict[str, Tensor] = {}
    for name, learned in part.operands().items():
        learned.register_forward_hook(lambda _, args, out, n=name: residue.update({n: (out - args[0]).detach()}))
    leaves = [x.clone().requires_grad_() for x in states]
    mask = torch.full((5, 5), float("-inf")).triu(1)
    query, key, value = leaves
    found = quantized_attention(module, query, key, value, mask, scaling=0.5, dropout=0.0)[0]
    weights = torch.randn(found.shape, generator=generator)
    gradients = torch.autograd.grad((found * weights).sum(), leaves)

    def surrogate(query: Tensor, key: Tensor, value: Tensor) -> float:
        q, k, v = (x + residue[n].double() for x, n in ((query, "query"), (key, "key"), (value, "value")))
        scores = q @ k.repeat_interleave(2, 1).mT * 0.5 + mask
        p = torch.softmax(scores, -1) + residue["probabilities"].double()
        out = (p @ v.repeat_interleave(2, 1)).transpose(1, 2)
        return float((out * weights).sum())

    exact = [x.double() for x in states]
    assert surrogate(*exact) == pytest.approx(float((found * weights).sum().detach()), rel=1e-5)
    for which, gradient in enumerate(gradients):
        for place in torch.randint(gradient.numel(), (6,), generator=generator).tolist():
            sides = []
            for step in (1e-5, -1e-5):
                moved = [x.clone() for x in exact]
                moved[which].view(-1)[place] += step
                sides.append(surrogate(*moved))
            assert float(gradient.view(-1)[place]) == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=2e-4, abs=2e-5)


@pytest.mark.parametrize(("line", "part"), [(PRODUCTS, "lsq"), (BITS, "elastic")])
def test_what_is_masked_stays_zero(line: dict[str, str], part: str) -> None:
    """In training too: hidden tokens have probability 0 exactly, and what they hold changes nothing."""
    model = prepare(build("bert"), {"rules": [line]}, {"matmuls": part}, run=run).train()
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    seen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, FakeOperands):
            module.operands()["probabilities"].register_forward_hook(lambda *given: seen.append(given[2]))
    first, other = batch(model), batch(model)
    other["input_ids"] = torch.where(other["attention_mask"] == 0, 17, other["input_ids"])
    assert not torch.equal(first["input_ids"], other["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**first).logits, model(**other).logits)
    assert len(seen) == 4 and all((p[1, :, :, 9:] == 0).all() and (p[0] >= 0).all() and p.any() for p in seen)


# ------------------------------------------------------------------------------------------------ caches
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma3_text", "bart"])
def test_a_pass_in_training_is_decoding_step_by_step(family: str) -> None:
    """LLM-QAT's third check: the full sequence computes what a cache in few bits gives token by token."""
    model = build(family)
    kv = {"kv": "int4 token"}
    prepare(model, kv)
    train(model, 1)
    encoder = {"input_ids": input_ids()} if family == "bart" else {}
    name = "decoder_input_ids" if encoder else "input_ids"
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FakeCache):
                module.train()  # the estimators' own formula
        whole = model(**encoder, **{name: input_ids()}, use_cache=False).logits
        convert(model)
        exact = model(**encoder, **{name: input_ids()}, use_cache=False).logits
        cache, steps = None, []
        for at in range(12):
            found = model(**encoder, **{name: input_ids()[:, at : at + 1]}, **seen_before(model, cache), use_cache=True)
            cache = found.past_key_values
            steps.append(found.logits)
    assert type(cache).__name__ in ("QuantizedCache", "EncoderDecoderCache")
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
    assert (whole - exact).norm() > 0.01 * exact.norm()


def test_calibrated_scales_begin_at_what_is_cached() -> None:
    """The largest key, and value, of the first batch over the largest number of the format."""
    seen: dict[str, list[float]] = {}

    class Look(transformers.DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            seen[f"model.layers.{layer_idx}.self_attn.{CACHED}"] = [
                float(x.abs().max()) for x in (key_states, value_states)
            ]
            return super().update(key_states, value_states, layer_idx)

    model = build("llama")
    with torch.no_grad():
        model(**batch(model), **given(model, Look(config=model.config)))
    prepare(model, {"kv": "float8_e4m3fn tensor static"}, run=run)
    found = {name: twin.format() for name, twin in twins(model).items() if isinstance(twin, FakeCache)}
    assert found.keys() == seen.keys()
    for name, kv in found.items():
        scales = [fixed_scale(quantizer) for quantizer in (kv.keys, kv.values)]
        assert scales == pytest.approx([largest / 448 for largest in seen[name]], rel=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradients_pass_a_cache_straight_through(implementation: str) -> None:
    """Those of keys are torch's for keys with a fixed error; recomputed layers (checkpointing) have the same."""
    config: Any = transformers.AutoConfig.for_model("llama", **{**BERT, "num_key_value_heads": 2})
    auto: Any = transformers.AutoModelForCausalLM
    model = prepare(auto.from_config(config, attn_implementation=implementation), {"kv": "int4 token"})
    attention = model.model.layers[1].self_attn
    seen: dict[str, Tensor] = {}

    def keep(_: nn.Module, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
        for name, before, after in zip(("key", "value"), given, made, strict=True):
            before.retain_grad()
            after.retain_grad()
            seen.update({name: before, f"{name} read": after})

    handle = attention.get_submodule(CACHED).register_forward_hook(keep)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            handle.remove()
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
        model.train().zero_grad()
        model(input_ids=input_ids(), labels=input_ids()).loss.backward()
        gradients.append(attention.k_proj.weight.grad.clone())
    for name in ("key", "value"):
        gradient, read = seen[name].grad, seen[f"{name} read"]
        torch.testing.assert_close(gradient, read.grad, rtol=1e-6, atol=0)
        assert gradient is not None and gradient.any()
        assert torch.equal(read, Quantizer("int4 token").fake_quantize(seen[name]))
    assert torch.equal(*gradients)


def test_llm_qats_own_order_needs_no_cache_in_few_bits() -> None:
    """Keys and values rounded as the projections' outputs: one scale for all heads, in front of the rotary embedding.

    A float cache then holds what the full pass computed, and appending tokens changes nothing before them.
    """
    scheme = {"rules": [{"targets": ["re:.*(k|v)_proj"], "outputs": "int4 token", "weights": "int8 channel"}]}
    model = prepare(build("llama"), scheme)
    train(model, 2)
    with torch.no_grad():
        whole = model(input_ids=input_ids(), use_cache=False).logits
        convert(model)
        assert torch.equal(model(input_ids=input_ids(), use_cache=False).logits, whole)
        cache: Any = None
        steps, before = list[Tensor](), None
        for at in range(12):
            found = model(input_ids=input_ids()[:, at : at + 1], **seen_before(model, cache), use_cache=True)
            cache = found.past_key_values
            now = cache.layers[1].keys.clone()
            assert before is None or torch.equal(now[:, :, :-1], before)
            before = now
            steps.append(found.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
    value = cache.layers[0].values.transpose(1, 2).flatten(2)  # [batch, tokens, all heads]
    scale = value.abs().amax(-1, keepdim=True) / 7
    assert (
        torch.equal((value / scale).round(), (value / scale))
        or ((value / scale) - (value / scale).round()).abs().max() < 1e-4
    )


# ------------------------------------------------------------------------------------------------ experts and the rest
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_ran_learn(family: str) -> None:
    model = prepare(build(family), {"targets": ["Experts"], "weights": "int4 channel"}).train()
    found = [twin for twin in twins(model).values() if isinstance(twin, FakeExperts)]
    assert len(found) == 4
    model(input_ids=input_ids()[:1, :1]).logits.square().sum().backward()
    for twin in found:
        learns = [weight.latent.grad is not None and bool(weight.latent.grad.any()) for weight in twin.weights()]
        assert sum(learns) == 2  # of four, by one token


def test_groups_of_all_kinds() -> None:
    model = prepare(
        build("gemma2"),
        {"rules": [TABLE, LINEAR, PRODUCTS], "kv": "int8 tensor static"},
        {"weights": "lsq", "matmuls": "lsq", "kv": "lsq"},
        run=run,
    )
    groups = learning_groups(model, {"matmuls.scales": 1e-5, "kv.scales": 1e-6, "scales": 1e-4})
    rates = {id(p): group.get("lr") for group in groups for p in group["params"]}
    assert sorted(rates) == sorted({id(p) for p in model.parameters()})
    for twin in twins(model).values():
        for name, parameters in twin.groups().items():
            wanted = {"matmuls.scales": 1e-5, "kv.scales": 1e-6, "weights.scales": 1e-4}.get(name)
            assert {rates[id(p)] for p in parameters} == {wanted}
    with pytest.raises(UsageError, match="no layer learns 'clip'"):
        learning_groups(model, {"clip": 1e-3})


def test_refusals() -> None:
    scheme: Any
    for family, scheme, learned, error, words in (
        (
            "llama",
            {"weights": "int4 channel", "ignore": []},
            {},
            SchemeError,
            r"lm_head: .*tied.*targets: \[Embedding\]",
        ),
        (
            "bart",
            {"targets": ["model.decoder.embed_tokens"], "weights": "int8 channel"},
            {},
            SchemeError,
            "no rule takes",
        ),
        ("bloom", {"kv": "int4 token"}, {}, ModelError, "layer 0 of Bloom.*can't be trained; leave kv out"),
        ("bert", {"kv": "int4 token"}, {}, ModelError, "Bert.*no text with a cache"),
        ("bart", {"kv": "int8 tensor static"}, {}, SchemeError, "encoder_attn: a cross-attention's cache.*'static'"),
        ("llama", {"kv": "int8 tensor static"}, {}, UsageError, "self_attn: static kv.keys begin.*give run"),
        ("llama", {"kv": "int4 token"}, {"kv": "lsq"}, SchemeError, "self_attn: lsq.*static"),
        ("llama", {"matmuls": "int8 group=16"}, {}, UsageError, "self_attn: .*group=16 does not divide"),
        ("llama", {"matmuls": "int8 tensor"}, {"matmul": "ste"}, UsageError, "'matmul'.*Did you mean 'matmuls'"),
        (
            "mixtral",
            {"targets": ["Experts"], "weights": "int4 rank1"},
            {"weights": "lsq"},
            SchemeError,
            "experts.*rank1",
        ),
    ):
        model = build(family)
        with pytest.raises(error, match=words):
            prepare(model, scheme, learned)
        assert not twins(model) and model.config._attn_implementation in ("sdpa", "eager")
    flash = build("llama")
    flash.config._attn_implementation = "flex_attention"
    with pytest.raises(ModelError, match="has flex_attention; load it with attn_implementation='sdpa'"):
        prepare(flash, {"rules": [TABLE], "kv": "int4 token"})
    assert not twins(flash) and flash.lm_head.weight is flash.get_input_embeddings().weight
    twice = prepare(build("opt"), {"matmuls": "int8 token"})
    with pytest.raises(SchemeError, match="self_attn: it has matmuls that are quantized, or trained, already"):
        prepare(twice, {"matmuls": "int4 token"})
    bad = prepare(build("llama"), {"rules": [TABLE]})
    with torch.no_grad():
        bad.get_input_embeddings().weight.latent[3, 4] = torch.nan
    with pytest.raises(DataError, match=r"embed_tokens: weight.latent holds 1 NaN"):
        convert(bad)
    assert len(twins(bad)) == 2
