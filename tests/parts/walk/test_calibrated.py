"""Calibration sees what the float model computes: whatever its blocks are called with, and however often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parts.models.test_whole import BART, SIZES, made
from tests.tiny import tiny_tokenizer
from torch import Tensor, nn

import nybble
from nybble.calibration.streams import Stream
from nybble.calibration.trace import HIDDEN, BlockCall
from nybble.core.errors import SchemeError
from nybble.recipe import parse_recipe
from nybble.walk.job import Job
from nybble.walk.settings import Settings

GPTQ = {"scheme": {"weights": "int8 channel"}, "steps": [{"solver": "gptq"}]}
STATIC = {"scheme": {"weights": "int8 channel", "inputs": "int2 tensor static"}, "steps": [{"solver": "rtn"}]}
GEMMA4 = {
    **SIZES, "num_hidden_layers": 4, "num_key_value_heads": 2, "vocab_size_per_layer_input": 60,
    "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "head_dim": 8, "global_head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
ZAMBA = {
    **SIZES, "num_key_value_heads": 4, "num_hidden_layers": 4, "mamba_d_state": 8, "n_mamba_heads": 2,
    "layers_block_type": ["mamba", "hybrid"] * 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}  # fmt: skip
WHISPER = {
    **BART, "vocab_size": 60, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64,
}  # fmt: skip
PERCEIVER = {
    "num_latents": 4, "d_latents": 32, "d_model": 16, "num_blocks": 2, "num_self_attends_per_block": 2,
    "num_self_attention_heads": 2, "num_cross_attention_heads": 2, "vocab_size": 60, "max_position_embeddings": 12,
    "qk_channels": 16, "v_channels": 32,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "of the tokens": ("Gemma4ForCausalLM", "gemma4_text", GEMMA4),
    "of the tokens, all of one": ("ZambaForCausalLM", "zamba", ZAMBA),
    "again and again": ("AlbertForMaskedLM", "albert", {**SIZES, "embedding_size": 16, "num_hidden_layers": 4}),
    "in rounds": ("PerceiverForMaskedLM", "perceiver", PERCEIVER),
    "lists": ("OpenAIGPTLMHeadModel", "openai-gpt", {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "a cache": ("WhisperForConditionalGeneration", "whisper", WHISPER),
}


def inputs_of(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 50, (4, 12), generator=generator)
    if name == "a cache":
        return {"input_features": torch.randn(4, 8, 32, generator=generator), "decoder_input_ids": ids[:, :7]}
    return {"inputs" if name == "in rounds" else "input_ids": ids}


@pytest.mark.parametrize("name", MODELS)
def test_static_scales_are_of_the_largest_inputs_that_layers_get(name: str) -> None:
    cls, kind, sizes = MODELS[name]
    model, inputs = made(cls, kind, sizes, 2), inputs_of(name)
    seen: dict[str, float] = {}

    def see(layer: str) -> Any:
        return lambda _, args: seen.update({layer: max(seen.get(layer, 0), float(args[0].abs().max()))})

    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    handles = [module.register_forward_pre_hook(see(layer)) for layer, module in layers.items()]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    settings = Settings(dtype=torch.float32, batch=2)
    recipe, ignore = parse_recipe({"name": "x", **STATIC}), ["re:.*shared_transf.*"] if kind == "zamba" else []
    _, report = nybble.quantize(model, recipe, inputs, ignore=ignore, settings=settings)
    assert len(report.layers) >= 6
    for row in report.layers:
        assert row.input_scale == pytest.approx(seen[row.name], rel=1e-4), row.name


def test_arguments_in_common_are_held_once_and_what_blocks_write_is_a_paths_own() -> None:
    stream, mask = Stream(4, torch.device("cpu")), torch.ones(2, 3)
    for start in (0, 2):
        written: dict[str, Tensor] = {}
        own = torch.full((2, 3), float(start))
        calls = [
            BlockCall(index=i, args=(own, (mask.clone(), None)), kwargs={"kv": written}, keyword=None, start=None)
            for i in range(2)
        ]
        stream.begin(start, calls, {HIDDEN: torch.zeros(2, 3)})
    first, second = stream.calls[0], stream.calls[2]
    assert second[0].args[1][0] is first[0].args[1][0] and second[0].args[1][0].equal(mask)
    assert [float(call.args[0][0, 0]) for call in (*first, *second)] == [0, 0, 2, 2]
    twin = stream.fork()
    first[0].kwargs["kv"]["k"] = mask
    assert first[1].kwargs["kv"] == {"k": mask}  # from block to block
    assert second[1].kwargs["kv"] == twin.calls[0][1].kwargs["kv"] == {}


def test_what_blocks_share_is_named_with_a_pattern_that_leaves_it_in_float() -> None:
    model, inputs = made("ZambaForCausalLM", "zamba", ZAMBA, 2), inputs_of("of the tokens, all of one")
    settings = Settings(dtype=torch.float32)
    with pytest.raises(SchemeError, match=r"is that of model\.layers\.3\.shared_transf\.self_attn\.q_proj too") as told:
        nybble.quantize(model, "rtn", weights="int8 channel", settings=settings)
    pattern = str(told.value).split("ignore '")[1].removesuffix("'.")
    _, report = nybble.quantize(model, "gptq", inputs, weights="int8 channel", ignore=[pattern], settings=settings)
    assert len(report.layers) == 2 * 3 + 2 * 2 and not any("shared" in row.name for row in report.layers)


def test_a_model_that_runs_on_its_own_length_alone_is_tried_on_a_whole_sample(tmp_path: Path) -> None:
    sizes = {**SIZES, "segment_means_seq_len": 16, "num_landmarks": 4, "conv_kernel_size": 3}
    made("NystromformerForMaskedLM", "nystromformer", sizes).save_pretrained(tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    inputs = {"input_ids": torch.randint(3, 50, (2, 16), generator=torch.Generator().manual_seed(1))}
    for recipe in ("gptq", "rtn"):
        _, report = nybble.quantize(
            tmp_path / "float", recipe, inputs, out=tmp_path / recipe, weights="int8 channel",
            settings=Settings(dtype=torch.float32),
        )  # fmt: skip
        assert "untried" not in report.manifest


def test_blocks_that_return_lists_run_in_the_trial(tmp_path: Path) -> None:
    cls, kind, sizes = MODELS["lists"]
    model = made(cls, kind, sizes, 2)
    model.save_pretrained(tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    out, report = nybble.quantize(
        tmp_path / "float", "rtn", out=tmp_path / "q", weights="int8 channel", embeddings="int8 channel", form="native",
        settings=Settings(dtype=torch.float32),
    )  # fmt: skip
    assert "untried" not in report.manifest
    ids = inputs_of("lists")["input_ids"]
    with torch.no_grad():
        exact, found = model(ids).logits, type(model).from_pretrained(out).eval()(ids).logits
    assert 0 < (found - exact).norm() < 0.05 * exact.norm()


def test_layers_are_counted_where_a_config_has_them_by_part(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "l_layers": 1,
        "x_layers": 1, "r_layers": 1, "visual_feat_dim": 16, "max_position_embeddings": 64,
    }  # fmt: skip
    model = made("LxmertModel", "lxmert", sizes)
    model.save_pretrained(tmp_path / "float")
    out, _ = nybble.quantize(tmp_path / "float", "rtn", out=tmp_path / "q", weights="int8 channel")
    loaded = nybble.load(out, dtype=torch.float32)[0]
    given = {
        "input_ids": torch.arange(3, 9)[None], "visual_feats": torch.ones(1, 5, 16), "visual_pos": torch.ones(1, 5, 4)
    }  # fmt: skip
    with torch.no_grad():
        exact, found = (each(**given).language_output for each in (model, loaded))
    assert 0 < (found - exact).norm() < 0.05 * exact.norm()


def test_hooks_on_a_layer_are_on_what_stands_for_it() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), torch.randn(4, 16)
    passed: list[str] = []
    handles = [
        net[0].register_forward_pre_hook(lambda _, args: (args[0] * 3,)),
        net[1].register_forward_hook(lambda _, __, y, *, scale=2: y * scale, with_kwargs=False),
        net[1].register_full_backward_hook(lambda *_: passed.append("back")),
    ]
    exact = net(x).detach()
    made_of, report = nybble.quantize(net, "rtn", weights="int8 channel", settings=Settings(dtype=torch.float32))
    assert len(report.layers) == 2
    found = made_of(x.requires_grad_())
    assert 0 < float((found - exact).detach().norm()) < 0.02 * exact.norm()
    found.sum().backward()
    assert passed == ["back"]
    for handle in handles:  # the caller's own still remove them
        handle.remove()
    assert not any(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks for layer in made_of)


def test_what_each_block_reads_alone_is_in_the_estimate() -> None:
    """Gemma 4's second embeddings: a slice of them for every block and token, kept until the block had its turn."""
    recipe = parse_recipe({"name": "x", **GPTQ})
    grown = []
    for each in (8, 8192):
        model = made("Gemma4ForCausalLM", "gemma4_text", {**GEMMA4, "hidden_size_per_layer_input": each})
        less, more = (
            Job.make(model, None, recipe, {"input_ids": torch.ones(samples, 64).long()}, Settings()).estimate.memory
            for samples in (64, 128)
        )
        grown.append(more - less)
    assert grown[1] - grown[0] == 64 * 64 * 4 * (8192 - 8) * 4  # samples, tokens, blocks, bytes of float32
