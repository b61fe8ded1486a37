"""Each family: linears found once, folds leave the output bit for bit, ties hold, blocks replay exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nybble.calibration.groups import trace_groups
from nybble.calibration.trace import HIDDEN, capture_block_calls
from nybble.core.errors import ModelError
from nybble.models.adapter import REGISTRY, LinearFold, adapter_for, feeding_rows, generic_adapter
from nybble.nn.kinds import matrix_at

SHARED_INPUT = {
    "gpt2": {("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)},
    "opt": {("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.out_proj",), ("fc1",), ("fc2",)},
    "gpt_neox": {("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)},
    "bloom": {
        ("self_attention.query_key_value",), ("self_attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)
    },
}  # fmt: skip
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@torch.no_grad()
def block_outputs(model: nn.Module, input_ids: torch.Tensor) -> list[torch.Tensor]:
    """What each block returns inside the model's own forward."""
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    handles = [block.register_forward_hook(keep) for block in adapter_for(model).blocks_of(model)]
    model(input_ids=input_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def logits(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return result


@torch.no_grad()
@pytest.mark.parametrize("on_meta", [False, True])
def test_replay_is_exact(family: str, make_model: Any, input_ids: torch.Tensor, on_meta: bool) -> None:
    model = make_model(family)
    expected = block_outputs(model, input_ids)
    seen_by_recorders = model
    if on_meta:  # blocks and head without weights: nothing in them may be computed
        seen_by_recorders = make_model(family)
        for block in adapter_for(model).blocks_of(seen_by_recorders):
            block.to("meta")
    calls = capture_block_calls(seen_by_recorders, input_ids)
    assert [call.start is not None for call in calls] == [True, False]
    given: Any = calls[0].start
    for block, call, wanted in zip(adapter_for(model).blocks_of(model), calls, expected, strict=True):
        given = call.run(block, given)
        assert torch.equal(given[HIDDEN], wanted)
    assert all("forward" not in block.__dict__ for block in adapter_for(model).blocks_of(seen_by_recorders))


@torch.no_grad()
def test_padded_batches_keep_their_mask(make_model: Any, input_ids: torch.Tensor) -> None:
    model = make_model("llama")
    mask = torch.ones_like(input_ids)
    mask[0, :4] = 0
    calls = capture_block_calls(model, {"input_ids": input_ids, "attention_mask": mask})
    given: Any = calls[0].start
    for block, call in zip(model.model.layers, calls, strict=True):
        given = call.run(block, given)
    own = model.model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert torch.equal(model.model.norm(given[HIDDEN]), own)
    assert not torch.equal(own[0], model.model(input_ids=input_ids, use_cache=False).last_hidden_state[0])


def test_every_linear_is_traced_once(family: str, make_model: Any, input_ids: torch.Tensor, all_linears: Any) -> None:
    model = make_model(family)
    adapter = adapter_for(model)
    calls = capture_block_calls(model, input_ids)
    given: Any = calls[0].start
    for block, call in zip(adapter.blocks_of(model), calls, strict=True):
        trace = trace_groups(block, call, given)
        names = [name for group in trace.groups for name in group]
        assert sorted(names) == sorted(all_linears(block))
        assert trace.uncalled == ()
        given = call.run(block, given)
        if family in SHARED_INPUT:
            assert set(trace.groups) == SHARED_INPUT[family]
            assert trace.other == ()
        else:
            assert trace.groups[0] == QKV and trace.groups[1] == ("self_attn.o_proj",)
        if "mlp.gate_proj" in names:
            assert ("mlp.gate_proj", "mlp.up_proj") in trace.groups
        if "mlp.experts" in names:
            assert trace.other == ("mlp.gate.weight",)  # the router


def test_a_module_that_is_never_called_is_named(make_model: Any, input_ids: torch.Tensor) -> None:
    model = make_model("llama")
    model.model.layers[0].spare = nn.Linear(32, 32)
    trace = trace_groups(model.model.layers[0], capture_block_calls(model, input_ids)[0])
    assert trace.uncalled == ("spare",)


@torch.no_grad()
def test_norm_folds_change_nothing(family: str, make_model: Any, input_ids: torch.Tensor) -> None:
    model = make_model(family)
    adapter = adapter_for(model)
    before = logits(model, input_ids)
    folded = 0
    for block in adapter.blocks_of(model):
        for fold in adapter.norm_folds_of(block, model.config):
            norm: Any = block.get_submodule(fold.norm)
            factor = 2.0 ** torch.randint(-1, 3, norm.weight.shape)  # powers of two: every rounding stays the same
            norm.weight.copy_((norm.weight + fold.offset) / factor - fold.offset)
            if getattr(norm, "bias", None) is not None:
                norm.bias.div_(factor)
            for reader in fold.readers:
                matrix_at(block, reader).mul_(factor)
            folded += 1
    assert folded == 4  # two norms in each of two blocks
    assert torch.equal(logits(model, input_ids), before)
    assert before.std() > 0.01


@torch.no_grad()
def test_linear_folds_change_nothing(family: str, make_model: Any, input_ids: torch.Tensor) -> None:
    model = make_model(family)
    adapter = adapter_for(model)
    before = logits(model, input_ids)
    folded = []
    for block in adapter.blocks_of(model):
        for fold in adapter.linear_folds_of(block, model.config):
            first, second = matrix_at(block, fold.first), matrix_at(block, fold.second)
            rows = feeding_rows(fold, model.config, second.shape[1])
            factor = 2.0 ** torch.randint(-1, 3, (len(first),))
            factor[torch.isin(torch.arange(len(factor)), rows, invert=True)] = 1  # q and k rows stay
            first.div_(factor[:, None])
            bias: Any = block.get_submodule(fold.first).bias
            if bias is not None:
                bias.div_(factor)
            second.mul_(factor[rows])
            folded.append(fold.first)
    assert len(folded) >= 2
    assert torch.equal(logits(model, input_ids), before)


def test_grouped_query_rows() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2)
    fold = LinearFold(first="v", second="o", rows="value_heads")
    assert feeding_rows(fold, config, 8).tolist() == [0, 1, 0, 1, 2, 3, 2, 3]


def test_ties_and_paths(family: str, make_model: Any) -> None:
    model = make_model(family)
    adapter = adapter_for(model)
    tied = [{f"{adapter.head}.weight", f"{adapter.embeddings[0]}.weight"}] if model.config.tie_word_embeddings else []
    assert [set(group) for group in adapter.tied_groups(model)] == tied
    assert adapter_for(model.config) is adapter
    assert model.get_submodule(adapter.head) is model.get_output_embeddings()
    assert model.get_submodule(adapter.embeddings[0]) is model.get_input_embeddings()
    assert adapter.final_norm is not None and isinstance(model.get_submodule(adapter.final_norm), nn.Module)
    block = adapter.block_names(model)[1]
    assert model.get_submodule(block) is adapter.blocks_of(model)[1]
    inside = {n for n, _ in model.named_parameters(remove_duplicate=False) if adapter.inside(n)}
    assert inside.isdisjoint(adapter.outside(model))
    assert inside | set(adapter.outside(model)) == {n for n, _ in model.named_parameters(remove_duplicate=False)}
    if adapter.experts is not None:
        assert hasattr(model.get_submodule(f"{block}.{adapter.experts}"), "down_proj")


def test_config_switches_folds_off_and_says_so(make_model: Any, input_ids: torch.Tensor) -> None:
    model = make_model("opt", do_layer_norm_before=False, activation_function="gelu")
    adapter = adapter_for(model)
    block = adapter.blocks_of(model)[0]
    assert adapter.norm_folds_of(block, model.config) == []
    assert [fold.first for fold in adapter.linear_folds_of(block, model.config)] == ["self_attn.v_proj"]
    limits = adapter.limits_of(model.config)
    assert any("do_layer_norm_before=False" in limit for limit in limits)
    assert any("fc1 -> fc2" in limit and "gelu" in limit for limit in limits)
    assert adapter.limits_of(make_model("opt").config) == []


def test_an_outdated_adapter_is_an_error(make_model: Any) -> None:
    model = make_model("llama")
    block = model.model.layers[0]
    del block.mlp.up_proj
    with pytest.raises(ModelError, match="post_attention_layernorm of LlamaDecoderLayer is not read by"):
        adapter_for(model).norm_folds_of(block, model.config)


def test_all_model_types_are_distinct() -> None:
    adapters = REGISTRY.all()
    types = [model_type for adapter in adapters.values() for model_type in adapter.model_types]
    assert len(types) == len(set(types))
    assert all(key == adapter.name for key, adapter in adapters.items())
    for adapter in adapters.values():  # a pair that isn't there has its reason
        assert {"blocks", "norm_folds", "linear_folds"} <= adapter.offers or any(
            "can't be" in x for x in adapter.limits
        )


def unknown_model() -> Any:
    """Falcon: parallel attention, not in the registry."""
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    with torch.random.fork_rng(devices=[]):
        model: Any = FalconForCausalLM(config)
        return model.eval()


@torch.no_grad()
def test_unknown_models_get_their_blocks(input_ids: torch.Tensor) -> None:
    model = unknown_model()
    adapter = adapter_for(model)
    assert (adapter.name, adapter.blocks, adapter.head) == ("generic", "transformer.h", "lm_head")
    assert adapter.embeddings == ("transformer.word_embeddings",)
    assert adapter.offers == {"blocks"}
    assert any("SmoothQuant" in limit and "FalconForCausalLM" in limit for limit in adapter.limits)
    expected = block_outputs(model, input_ids)
    calls = capture_block_calls(model, input_ids)
    given: Any = calls[0].start
    for block, call, wanted in zip(model.transformer.h, calls, expected, strict=True):
        given = call.run(block, given)
        assert torch.equal(given[HIDDEN], wanted)


def test_refusals() -> None:
    from transformers import FalconConfig

    with pytest.raises(ModelError, match="no adapter for model type 'falcon'; known: bart, bert, bloom"):
        adapter_for(FalconConfig())
    assert generic_adapter(nn.Sequential(nn.Linear(2, 2))).whole == "Sequential has no list of repeated blocks"
    with pytest.raises(ModelError, match="Sequential has no layer that multiplies"):
        generic_adapter(nn.Sequential(nn.ReLU()))
    with pytest.raises(ModelError, match=r"no blocks at 'model.layers'"):
        adapter = REGISTRY.get("llama")
        adapter.blocks_of(nn.Linear(2, 2))
