"""Models that can't be walked from block to block are one block; what can't be quantized says so before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.tiny import tiny_tokenizer
from torch import nn

import nybble
from nybble.calibration.chain import chain_fault
from nybble.core.errors import ModelError
from nybble.models.adapter import adapter_for
from nybble.nn.read_weights import read_weights
from nybble.recipe import parse_recipe
from nybble.walk.settings import Settings

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BART: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
XLM = {
    "vocab_size": 60, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64, "pad_index": 0,
    "n_langs": 1, "use_lang_emb": False,
}  # fmt: skip
MLLAMA = {
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 2,
        "attention_heads": 4, "image_size": 32, "patch_size": 8, "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]], "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 96,
    },
    "text_config": {
        **SIZES, "num_key_value_heads": 2, "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "image_token_index": 59,
}  # fmt: skip
FUNNEL = {"vocab_size": 60, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1]}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
LUKE = {**SIZES, "entity_vocab_size": 20, "entity_emb_size": 16}
RWKV = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64, "attention_hidden_size": 32}
TOKENS, PAIRS = ("input_ids",), ("input_ids", "decoder_input_ids")
MODELS: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...], bool]] = {
    "pegasus_x": (
        "PegasusXForConditionalGeneration", "pegasus_x",
        {**BART, "vocab_size": 60, "num_global_tokens": 4, "block_size": 4}, PAIRS, True,
    ),
    "fsmt": (
        "FSMTForConditionalGeneration", "fsmt",
        {**BART, "langs": ["en", "de"], "src_vocab_size": 60, "tgt_vocab_size": 60}, PAIRS, True,
    ),
    "mllama": ("MllamaForConditionalGeneration", "mllama", MLLAMA, TOKENS, True),
    "xlm": ("XLMWithLMHeadModel", "xlm", XLM, TOKENS, True),
    "albert, two groups": (
        "AlbertForMaskedLM", "albert",
        {**SIZES, "embedding_size": 16, "num_hidden_groups": 2, "num_hidden_layers": 4}, TOKENS, True,
    ),
    "rwkv": ("RwkvForCausalLM", "rwkv", RWKV, TOKENS, True),
    "swinv2": ("Swinv2ForImageClassification", "swinv2", SWIN, ("pixel_values",), True),
    # walked, and refused or broken before
    "luke": ("LukeForMaskedLM", "luke", LUKE, TOKENS, False),
    "funnel": ("FunnelForSequenceClassification", "funnel", FUNNEL, TOKENS, False),
}  # fmt: skip


def made(name: str, kind: str, sizes: dict[str, Any], factor: float = 3) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        cls: Any = getattr(transformers, name)
        model = cls._from_config(transformers.AutoConfig.for_model(kind, **sizes), dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor if parameter.ndim > 1 else 1)
    return model


def inputs_of(names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 53, (2, 12), generator=generator)
    return {n: torch.randn(2, 3, 32, 32, generator=generator) if n == "pixel_values" else ids for n in names}


def output(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("name", MODELS)
def test_calibrated_to_a_folder_and_back(name: str, tmp_path: Path) -> None:
    cls, kind, sizes, names, whole = MODELS[name]
    model, inputs, settings = made(cls, kind, sizes), inputs_of(names), Settings(dtype=torch.float32, batch=2)
    exact = output(model, inputs)
    model.save_pretrained(tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    lines: list[str] = []
    out, _ = nybble.quantize(
        tmp_path / "float", "gptq", inputs, out=tmp_path / "q", weights="int8 channel", settings=settings,
        form="native",
        announce=lines.append,
    )  # fmt: skip
    assert any("one block" in line for line in lines) == whole
    assert not any("trial" in line for line in lines)
    memory, _ = nybble.quantize(model, "gptq", inputs, weights="int8 channel", settings=settings)
    expected = output(memory, inputs)
    assert 0 < (expected - exact).norm() < 0.1 * exact.norm()
    theirs = type(model).from_pretrained(out).eval()
    for loaded in (nybble.load(out, dtype=torch.float32)[0], theirs):
        assert torch.equal(output(loaded, inputs), expected)


def test_blip2_of_its_own_samples() -> None:
    sizes = {
        "vision_config": VISION,
        "qformer_config": {**SIZES, "encoder_hidden_size": 32, "cross_attention_frequency": 2},
        "text_config": {"model_type": "opt", **SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32},
        "num_query_tokens": 4, "image_token_index": 59,
    }  # fmt: skip
    model, inputs = made("Blip2ForConditionalGeneration", "blip-2", sizes), inputs_of(("pixel_values", "input_ids"))
    inputs["input_ids"][:, :4] = 59
    exact = output(model, inputs)
    _, report = nybble.quantize(model, "gptq", inputs, weights="int8 channel", settings=Settings(dtype=torch.float32))
    assert 0 < (output(model, inputs) - exact).norm() < 0.1 * exact.norm()
    parts = {row.name.split(".")[0] for row in report.layers}
    assert {"vision_model", "qformer", "language_projection", "language_model"} <= parts


def test_inputs_are_those_that_the_model_computes() -> None:
    """XLM's attentions are a list of blocks by their look; between them are its norms and its MLPs."""
    model, inputs = made("XLMWithLMHeadModel", "xlm", XLM), inputs_of(TOKENS)
    seen: dict[str, float] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: float(args[0].abs().max())}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    output(model, inputs)
    for handle in handles:
        handle.remove()
    recipe = parse_recipe(
        {
            "name": "x",
            "scheme": {"weights": "int8 channel", "inputs": "int2 tensor static"},
            "steps": [{"solver": "rtn"}],
        }
    )
    _, report = nybble.quantize(model, recipe, inputs, settings=Settings(dtype=torch.float32))
    assert len(report.layers) == 2 * (4 + 2)
    for row in report.layers:
        assert row.input_scale == pytest.approx(seen[row.name], rel=1e-5), row.name


def test_a_layer_that_is_called_twice_has_a_gradient_of_each_row_that_it_reads() -> None:
    """Pegasus-X's attention projects tokens and global tokens; those of its last encoder layer go nowhere."""
    cls, kind, sizes, names, _ = MODELS["pegasus_x"]
    step = {"solver": "llm-fp4", "loss": "fisher", "grid": 4, "rounds": 1, "tokens": 8}
    scheme = {"weights": "e2m1 channel", "targets": [r"re:model.encoder.layers.1.self_attn.*_proj"]}
    recipe = parse_recipe({"name": "x", "scheme": scheme, "steps": [step]})
    _, report = nybble.quantize(
        made(cls, kind, sizes), recipe, inputs_of(names), settings=Settings(dtype=torch.float32)
    )
    assert [row.error is not None and row.error < 0.2 for row in report.layers] == [True] * 4


def test_a_model_that_changes_what_goes_between_blocks_is_no_chain() -> None:
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    given = inputs_of(TOKENS)
    assert chain_fault(model, adapter_for(model), given) is None
    assert chain_fault(model.to("meta"), adapter_for(model), given) is None
    model = transformers.LlamaForCausalLM(model.config)
    change: Any = lambda _, args: (2 * args[0], *args[1:])  # noqa: E731
    model.model.layers[1].register_forward_pre_hook(change)  # as if the model did it before it calls the block
    assert chain_fault(model, adapter_for(model), given) is not None
    given = inputs_of(PAIRS)
    model = made("BartForConditionalGeneration", "bart", {**BART, "vocab_size": 60})
    assert chain_fault(model, adapter_for(model), given) is None
    model.model.decoder.layers[1].register_forward_pre_hook(change)
    assert chain_fault(model, adapter_for(model), given) is not None


@pytest.mark.parametrize("name", ["pegasus_x", "albert, two groups"])
def test_what_is_no_chain_is_tried_whole_without_data_too(name: str, tmp_path: Path) -> None:
    cls, kind, sizes, _, _ = MODELS[name]
    made(cls, kind, sizes).save_pretrained(tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    lines: list[str] = []
    _, report = nybble.quantize(
        tmp_path / "float", "rtn", out=tmp_path / "q", weights="int8 channel", announce=lines.append
    )
    assert "untried" not in report.manifest and not any("trial" in line for line in lines)


def test_layers_of_its_own_are_refused_by_name() -> None:
    """I-BERT's linears are no ``nn.Linear``."""
    model = made("IBertForMaskedLM", "ibert", SIZES)
    with pytest.raises(ModelError, match=r"IBertForMaskedLM multiplies in layers of its own \(.*QuantLinear"):
        nybble.quantize(model, "rtn")


def test_weights_that_a_loop_over_blocks_reads_stay_in_float() -> None:
    found = read_weights(made("RwkvForCausalLM", "rwkv", RWKV))
    ends = ("attention.output", "feed_forward.value")
    assert found == {f"rwkv.blocks.{index}.{end}" for index in range(2) for end in ends}
