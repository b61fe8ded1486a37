"""A quantized folder under another head or none, bare decoders, and folders that are loaded, saved and loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.tiny import FAMILIES, SIZES, input_ids, save_text, tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

import nybble
from nybble.models.sources.open import open_source
from nybble.nn.embedding import QuantEmbedding, TiedHead
from nybble.nn.kinds import quant_modules
from nybble.nn.packed import Packed
from nybble.pipelines.evaluate import run_eval
from nybble.pipelines.request import build_recipe

CAUSAL, BARE, CLASSES, MASKED = (
    AutoModelForCausalLM,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForMaskedLM,
)
SETTINGS = nybble.Settings(samples=4, seq_len=12, batch=2, dtype=torch.float32)
TABLES = {"embeddings": "int8 channel"}


def save_float(folder: Path, family: str, auto: Any) -> Any:
    """A random model with a tokenizer that pads."""
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {})})
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(folder)
    return model


def quantized(folder: Path, family: str, auto: Any, **lines: Any) -> Path:
    save_float(folder / "float", family, auto)
    made = build_recipe("rtn", weights="int8 channel", **lines)
    # Of nybble's own form, which its hooks load into other heads.
    nybble.quantize(str(folder / "float"), made, out=folder / "out", settings=SETTINGS, form="native")
    return folder / "out"


@torch.no_grad()
def hidden(model: Any) -> Tensor:
    """What the model under the head says."""
    base = getattr(model, model.base_model_prefix, model).eval()
    if not model.config.is_encoder_decoder:
        found: Tensor = base(input_ids=input_ids())[0]
    else:  # T5 has no base model under its head
        both = base(input_ids=input_ids(), decoder_input_ids=input_ids(), output_hidden_states=True)
        found = both.decoder_hidden_states[-1]
    return found


@pytest.mark.parametrize(
    ("family", "first", "other", "lines"),
    [
        ("llama", CAUSAL, BARE, TABLES),
        ("llama", CAUSAL, CLASSES, {"kv": "int4 group=8"}),
        ("llama", BARE, CAUSAL, TABLES),
        ("gpt2", CAUSAL, BARE, {}),
        ("mixtral", CAUSAL, BARE, {}),
        ("bert", BARE, MASKED, TABLES),
        ("bert", MASKED, CLASSES, {}),
        ("xlm-roberta", MASKED, BARE, {}),
        ("t5", AutoModelForSeq2SeqLM, BARE, {}),
    ],
)
def test_another_head(tmp_path: Path, family: str, first: Any, other: Any, lines: Any) -> None:
    """As transformers does with a float folder; and what is saved again loads again, with both loaders."""
    out = quantized(tmp_path, family, first, **lines)
    own, model = first.from_pretrained(out), other.from_pretrained(out)
    expected = hidden(own) if "kv" not in lines else hidden(other.from_pretrained(tmp_path / "float"))
    if "kv" in lines:  # a classifier caches nothing
        assert 0 < float((hidden(model) - expected).norm() / expected.norm()) < 0.01
    else:
        assert torch.equal(hidden(model), expected)
    assert not any(p.is_meta for p in model.parameters())
    model.save_pretrained(tmp_path / "again")
    for found in (other.from_pretrained(tmp_path / "again"), nybble.load(tmp_path / "again")[0]):
        assert type(found) is type(model) and torch.equal(hidden(found), hidden(model))
        assert dict(quant_modules(found)).keys() == dict(quant_modules(model)).keys()


def test_a_head_that_comes_to_a_quantized_table_reads_it(tmp_path: Path) -> None:
    model: Any = CAUSAL.from_pretrained(quantized(tmp_path, "llama", BARE, **TABLES))
    assert model.model.config.tie_word_embeddings is True and isinstance(model.lm_head, TiedHead)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.embed_tokens, QuantEmbedding)


def said(folder: Path) -> dict[str, Any]:
    """config.json, with each module's layout in place of the layout's number."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    layouts = config["quantization_config"].pop("layouts")
    for entry in config["quantization_config"]["modules"].values():
        if "weight" in entry:
            entry["weight"] = layouts[entry["weight"]]
        entry["weights"] = [layouts[number] for number in entry.get("weights", ())]
    return config


@pytest.mark.parametrize(
    ("family", "auto", "lines"),
    [
        *((family, CAUSAL, {}) for family in sorted(FAMILIES)),
        *((family, CAUSAL, TABLES) for family in ("llama", "gpt2", "opt", "bloom", "mixtral")),
        ("bert", MASKED, TABLES), ("roberta", MASKED, TABLES), ("xlm-roberta", MASKED, {}),
        ("t5", AutoModelForSeq2SeqLM, {}),
    ],
)  # fmt: skip
def test_round_trips_are_the_identity(tmp_path: Path, family: str, auto: Any, lines: Any) -> None:
    out = quantized(tmp_path, family, auto, **lines)
    stored, config = load_file(out / "model.safetensors"), said(out)
    for name, load in (("auto", auto.from_pretrained), ("nybble", lambda path: nybble.load(path)[0])):
        model = load(out)
        model.save_pretrained(tmp_path / name)
        again = load_file(tmp_path / name / "model.safetensors")
        assert again.keys() == stored.keys()
        assert all(torch.equal(again[n], t) and again[n].dtype == t.dtype for n, t in stored.items())
        assert said(tmp_path / name) == config
        assert torch.equal(hidden(load(tmp_path / name)), hidden(model))


@torch.no_grad()
def test_names_that_transformers_would_write_in_their_old_form(tmp_path: Path) -> None:
    """DINOv3's files say ``layer.0`` where the model has ``model.layer.0``; the description has the model's names."""
    sizes: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    DINOv3ViTModel(DINOv3ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(tmp_path / "float")
    made = build_recipe("rtn", weights="int8 channel")
    out, _ = nybble.quantize(str(tmp_path / "float"), made, out=tmp_path / "out", settings=SETTINGS)
    model: Any = DINOv3ViTModel.from_pretrained(out)
    model.save_pretrained(tmp_path / "again")
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for found in (nybble.load(tmp_path / "again")[0], DINOv3ViTModel.from_pretrained(tmp_path / "again")):
        assert torch.equal(found(pixels).last_hidden_state, model(pixels).last_hidden_state)
    stored = load_file(out / "model.safetensors")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == stored.keys()


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_a_tied_head_with_a_bias_is_saved_with_it(tmp_path: Path, family: str) -> None:
    model = save_float(tmp_path / "float", family, MASKED)
    with torch.no_grad():
        model.get_output_embeddings().bias.normal_()
    nybble.quantize(model, build_recipe("rtn", weights="int8 channel", **TABLES))
    model.save_pretrained(tmp_path / "out")
    auto: Any = MASKED
    for found in (auto.from_pretrained(tmp_path / "out"), nybble.load(tmp_path / "out")[0]):
        assert torch.equal(found.get_output_embeddings().bias, model.get_output_embeddings().bias)
        with torch.no_grad():
            assert torch.equal(found.eval()(input_ids()).logits, model(input_ids()).logits)


@pytest.mark.parametrize("family", ["mistral", "gpt2", "opt", "mixtral"])
def test_bare_decoders(tmp_path: Path, family: str) -> None:
    """The embedding models: calibrated on sentences, judged by the cosine of their embeddings."""
    save_float(tmp_path / "float", family, BARE)
    text = tmp_path / "text.txt"
    words = save_text(text).read_text().split()
    text.write_text("\n".join(" ".join(words[n : n + 8]) for n in range(0, len(words), 8)))  # sentences
    out, report = nybble.quantize(
        str(tmp_path / "float"), build_recipe("gptq", weights="int4 channel"), str(text), out=tmp_path / "out",
        settings=SETTINGS,
    )  # fmt: skip
    assert all(row.error is not None and 0 < row.error < 0.1 for row in report.layers)
    auto: Any = AutoModel
    assert torch.equal(hidden(auto.from_pretrained(out)), hidden(nybble.load(tmp_path / "out")[0]))
    found = run_eval({"it": str(out)}, str(text), reference=str(tmp_path / "float"), seq_len=12, samples=1)
    assert 0.9 < found["models"]["it"]["cosine"] < 1


@pytest.mark.parametrize(
    ("family", "auto", "lacks", "base"),
    [
        ("mistral", CAUSAL, ("lm_head",), "MistralModel"),
        ("mixtral", CAUSAL, ("lm_head",), "MixtralModel"),
        ("bert", MASKED, ("cls",), "BertModel"),  # without its pooler too
    ],
)
def test_a_config_that_names_a_head_which_the_file_lacks(
    tmp_path: Path, family: str, auto: Any, lacks: tuple[str, ...], base: str
) -> None:
    save_float(tmp_path, family, auto)
    stored = load_file(tmp_path / "model.safetensors")
    save_file({n: t for n, t in stored.items() if not n.startswith(lacks)}, tmp_path / "model.safetensors")
    source = open_source(str(tmp_path))
    assert source.note.startswith(f"The files have no head of the model that config.json names; read as {base}.")
    theirs: Any = AutoModel
    reference, ours = theirs.from_pretrained(tmp_path), source.model(torch.float32)
    assert type(ours).__name__ == base and torch.equal(hidden(ours), hidden(reference))
    nybble.quantize(str(tmp_path), build_recipe("rtn", weights="int8 channel"), out=tmp_path / "out", settings=SETTINGS)
    if family == "bert":  # transformers builds a pooler all the same, and would take it for a packed one
        assert "pooler.dense" in json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    loaded = nybble.load(tmp_path / "out")[0]
    assert torch.equal(hidden(theirs.from_pretrained(tmp_path / "out")), hidden(loaded))
    assert 0 < float((hidden(loaded) - hidden(reference)).norm() / hidden(reference).norm()) < 0.05


SMALL = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN = {
    "text_config": SMALL, "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
    "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8,
}  # fmt: skip
WAVLM = {
    **{key: value for key, value in SMALL.items() if "key_value" not in key}, "conv_dim": (8, 8), "conv_stride": (2, 2),
    "conv_kernel": (3, 3), "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "tdnn_dim": (8, 8),
    "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 8,
}  # fmt: skip


def made(folder: Path, name: str, family: str, sizes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    cls: Any = getattr(transformers, name)
    model = cls._from_config(AutoConfig.for_model(family, **sizes), dtype=torch.bfloat16).eval()
    model.save_pretrained(folder / "float")
    nybble.quantize(str(folder / "float"), "rtn", weights="int8 channel", out=folder / "out", form="native")
    return cls


@pytest.mark.parametrize(
    ("name", "family", "sizes"),
    [("Qwen2VLForConditionalGeneration", "qwen2_vl", QWEN), ("WavLMForXVector", "wavlm", WAVLM)],
)
def test_the_model_under_a_head_gets_every_weight(
    tmp_path: Path, name: str, family: str, sizes: dict[str, Any]
) -> None:
    """Qwen's towers were renamed twice and came with random weights; WavLM's head has a name of its base model's."""
    made(tmp_path, name, family, sizes)
    model, found = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    usual, same = AutoModel.from_pretrained(tmp_path / "float", output_loading_info=True)
    assert not found["missing_keys"] - same["missing_keys"]
    compared = 0
    for place, module in quant_modules(model):
        want, packed = usual.get_submodule(place).weight.float(), module.get_submodule("weight")
        assert isinstance(packed, Packed)
        got = packed.qtensor().dequantize().float()
        torch.testing.assert_close(got, want, rtol=0, atol=float(want.detach().abs().max()) / 100)
        compared += 1
    assert compared >= 7


@pytest.mark.parametrize(
    ("name", "family", "sizes"),
    [
        ("LlamaForQuestionAnswering", "llama", SMALL),
        ("Qwen2ForQuestionAnswering", "qwen2", SMALL),
        ("MegatronBertForMultipleChoice", "megatron-bert", {k: v for k, v in SMALL.items() if "key_value" not in k}),
    ],
)
def test_heads_that_call_the_base_model_otherwise_or_shape_their_inputs(
    tmp_path: Path, name: str, family: str, sizes: dict[str, Any]
) -> None:
    """From a folder and back: the first two have their decoder in ``transformer``, the last asks for choices."""
    cls = made(tmp_path, name, family, sizes)
    usual, back = cls.from_pretrained(tmp_path / "float"), nybble.load(tmp_path / "out")[0]
    assert len(list(quant_modules(back))) >= 12
    ids = torch.arange(3, 19).reshape(1, 2, 8) if "Choice" in name else torch.arange(3, 19).reshape(2, 8)
    with torch.no_grad():
        want, got = usual(input_ids=ids)[0].float(), back(input_ids=ids)[0].float()
    assert 0 < float((want - got).norm() / want.norm()) < 0.05
