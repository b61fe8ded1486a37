"""What compressed-tensors' own writer, decoder and transformers make of the same weights and scales."""

from __future__ import annotations

import json
import shutil
import warnings
from importlib.metadata import PackageNotFoundError
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.parts.export.folders import model, quantized
from torch import nn
from transformers import AutoModelForCausalLM

from nybble.core import versions as versions_module
from nybble.core.errors import FileError, ModelError, SchemeError, UsageError
from nybble.export import _ct_library as library_module
from nybble.export import compressed_tensors as target_module
from nybble.export import get_target
from nybble.export._ct_config import form_of
from nybble.export._ct_layers import placed
from nybble.export._ct_takes import TAKES, rows_for
from nybble.export._source import FolderSource
from nybble.models.sources.open import open_source
from nybble.pipelines.export import export
from nybble.pipelines.quantize import quantize

REASON = "the oracle of vLLM's checkpoints: pip install compressed-tensors"
with warnings.catch_warnings():  # what it warns of at import is none of ours
    warnings.simplefilter("ignore")
    pytest.importorskip("compressed_tensors", reason=REASON)
    from compressed_tensors.compressors import BaseCompressor, ModelCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config

TARGET = "compressed-tensors"
BESIDE = ("version", "quant_method", "sparsity_config", "transform_config", "dequantize")
"""Of ``quantization_config``: what is no field of that class, but of transformers', or written by ``update_config``."""
WEIGHTS = {
    "int4 group=16": "pack-quantized",
    "int8 channel": "pack-quantized",
    "int2_full group=32 symmetric=false": "pack-quantized",
    "int3 group=32": "pack-quantized",
    "int5 channel": "pack-quantized",
    "int6 group=16 symmetric=false": "pack-quantized",
    "int7 tensor": "pack-quantized",
    "uint4 group=32 symmetric=false": "pack-quantized",
    "int8 tensor symmetric=false": "pack-quantized",
    "int4-ct group=32": "pack-quantized",
    "int4 flat=32": "pack-quantized",
    "int4 block=1x16": "pack-quantized",
    "ternary channel packing=base3": "pack-quantized",
    "mxint8": "pack-quantized",
    "float8_e4m3fn tensor": "naive-quantized",
    "float8_e4m3fn channel": "naive-quantized",
    "float8_e4m3fn group=32": "naive-quantized",
    "float8_e4m3fn block=16x32": "naive-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "nvfp4-ct": "nvfp4-pack-quantized",
    "nvfp4-search": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp6": "mxfp6-pack-quantized",
    "mxfp8": "mxfp8-quantized",
}
BOTH = {
    ("int8-ct", "int8_full token scale=absmax(target=127.5)"): "int-quantized",
    ("int8 channel", "int8 tensor static"): "int-quantized",
    ("int4 group=32", "int8_full token scale=absmax(target=127.5)"): "int-quantized",
    ("int8 channel symmetric=false", "int8 token symmetric=false"): "int-quantized",
    ("float8_e4m3fn channel", "float8_e4m3fn token"): "float-quantized",
    ("float8_e4m3fn tensor", "float8_e4m3fn tensor static"): "float-quantized",
    ("float8_e4m3fn block=16x32", "float8_e4m3fn group=32 scale_format=float32"): "float-quantized",
    ("int4 group=32", "float8_e4m3fn token"): "int-quantized",
    ("nvfp4", "nvfp4"): "nvfp4-pack-quantized",  # inputs under a calibrated divisor, that of the target
    ("mxfp4", "mxfp4"): "mxfp4-pack-quantized",
    ("mxfp8", "mxfp8"): "mxfp8-quantized",
    ("mxfp6", "mxfp6"): "mxfp6-pack-quantized",
    ("none", "float8_e4m3fn token"): "dense",
}


def written(folder: Path, dest: Path, **options: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    """What export says, the tensors, config.json; whose quantization the library's own classes would write so."""
    found = export(folder, dest, TARGET, **options)
    config = json.loads((dest / "config.json").read_text())
    said = {k: v for k, v in config["quantization_config"].items() if k not in BESIDE}
    assert QuantizationConfig.model_validate(said).model_dump(mode="json", exclude={"quant_method"}) == said
    return found, load_file(dest / "model.safetensors"), config


def by_its_own_writer(folder: Path, config: dict[str, Any], dest: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model with nybble's dequantized weights, compressed by the library with nybble's scales: tensors, config."""
    auto: Any = AutoModelForCausalLM
    with FolderSource(folder) as source, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_config(source.transformers_config, dtype=torch.float32)
        asked = QuantizationConfig.model_validate(config | {"quantization_status": "frozen"})
        apply_quantization_config(model, asked, show_progress=False)
        for place in placed(source, source.skeleton()):
            module = model.get_submodule(place.name)
            tensors = place.tensors(source)
            if place.matrix is not None:
                matrix = place.matrix.read()
                decoded = BaseCompressor.get_value_from_registry(place.scheme["format"]).decompress(
                    {k.rpartition(".")[2]: _value(source, p) for k, p in tensors.items() if ".weight" in k},
                    module.quantization_scheme,
                )
                module.weight.data = matrix.dequantize()
                for name in ("weight_scale", "weight_zero_point", "weight_global_scale"):
                    if name in decoded:
                        setattr(module, name, nn.Parameter(decoded[name].clone(), requires_grad=False))
            for side in ("input_scale", "input_zero_point"):
                if f"{place.name}.{side}" in tensors:
                    value = _value(source, tensors[f"{place.name}.{side}"])
                    setattr(module, side, nn.Parameter(value, requires_grad=False))
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        dest.mkdir()
        compressor.update_config(str(dest))
        theirs = json.loads((dest / "config.json").read_text())["quantization_config"]
        names = [place.name for place in placed(source, source.skeleton())]
        return {k: v for k, v in model.state_dict().items() if k.rpartition(".")[0] in names}, theirs


def _value(source: FolderSource, plan: Any) -> torch.Tensor:
    if callable(plan.bytes_from):
        made: torch.Tensor = plan.bytes_from()
        return made
    data = plan.bytes_from.read_bytes()[plan.offset : plan.offset + plan.nbytes]
    kinds = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F16": torch.float16, "F32": torch.float32}
    kind = kinds.get(plan.dtype, torch.bfloat16)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(kind).view(plan.shape)


def positive_zero(name: str, tensor: torch.Tensor, form: str) -> torch.Tensor:
    """Without the sign of zeros: a dequantized weight has it, and their FP4 encoder keeps it, but for one of them."""
    if not name.endswith("weight_packed") or "fp" not in form or form.startswith("mxfp6"):
        return tensor
    low, high = tensor & 15, tensor >> 4
    return torch.where(low == 8, 0, low) | torch.where(high == 8, 0, high) << 4


@pytest.mark.parametrize("line", WEIGHTS)
def test_bytes_config_and_values(line: str, tmp_path: Path) -> None:
    folder = quantized(weights=line, target=TARGET)
    found, ours, config = written(folder, tmp_path / "d", check=True)
    quantization = config["quantization_config"]
    assert quantization["format"] == WEIGHTS[line]
    assert quantization["ignore"] == ["lm_head"] and quantization["config_groups"]["group_0"]["targets"] == ["Linear"]
    theirs, said = by_its_own_writer(folder, quantization, tmp_path / "t")
    group = dict(quantization["config_groups"]["group_0"])
    expected = dict(said["config_groups"]["group_0"])
    assert {k: group["weights"][k] for k in expected["weights"]} == expected["weights"]
    assert (group["format"], quantization["format"]) == (expected["format"], said["format"])
    for name, tensor in theirs.items():
        if name.endswith(".bias"):
            continue
        mine = ours[name]
        if name.endswith("_scale") and mine.dtype != tensor.dtype:  # their model is in float32
            assert torch.equal(mine.float(), tensor.float()), name
            continue
        assert mine.dtype == tensor.dtype and mine.shape == tensor.shape, (name, mine.dtype, tensor.dtype)
        form = WEIGHTS[line]
        assert torch.equal(
            positive_zero(name, mine.view(torch.uint8), form), positive_zero(name, tensor.view(torch.uint8), form)
        ), name
    checked = found["check"]
    assert checked["weights"] == 14 and not checked["uncalled"]
    assert checked["cosine"] > (1 - 1e-6 if checked["exact_in"] == "float32" else 0.999)
    if line == "nvfp4":
        assert checked["exact_in"] == "float32"  # the outer scale is a power of two


@pytest.mark.parametrize(("weights", "inputs"), BOTH)
def test_inputs(weights: str, inputs: str, tmp_path: Path) -> None:
    calibrated = "static" in inputs or inputs == "nvfp4"
    folder = quantized(weights=weights, activations=inputs, target=TARGET, calibrated=calibrated)
    found, ours, config = written(folder, tmp_path / "d", check=True)
    quantization = config["quantization_config"]
    assert quantization["format"] == BOTH[weights, inputs]
    args = quantization["config_groups"]["group_0"]["input_activations"]
    assert args["dynamic"] == ("local" if inputs == "nvfp4" else "static" not in inputs)
    assert ("model.layers.0.mlp.up_proj.input_global_scale" in ours) is (inputs == "nvfp4")
    assert ("model.layers.0.mlp.up_proj.input_scale" in ours) is ("static" in inputs)
    # int8 with 127 codes is nybble's and vLLM's; the library divides by 127.5
    assert found["check"]["cosine"] > (0.998 if inputs.startswith("int8 ") else 1 - 1e-6)


def test_siblings_share_the_divisor_of_their_input(tmp_path: Path) -> None:
    """One that differs, which no calibration gives, is refused with the names of all."""
    changes = {"weights": "nvfp4", "activations": "nvfp4", "target": TARGET, "form": "native"}
    shutil.copytree(quantized(calibrated=True, **changes), tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    divisors = [tensors[f"model.layers.0.self_attn.{n}_proj.inputs.divisor"] for n in "qkv"]
    assert divisors[0] == divisors[1] == divisors[2] != tensors["model.layers.0.mlp.down_proj.inputs.divisor"]
    tensors["model.layers.0.self_attn.k_proj.inputs.divisor"] *= 2
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"q_proj, .*k_proj, .*v_proj: different global scales of inputs"):
        export(tmp_path / "q", tmp_path / "d", TARGET)


def test_inputs_measured_whole_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"runtimes want a calibrated one\); it takes nvfp4-ct static"):
        export(quantized(weights="int8 channel", activations="nvfp4"), tmp_path / "d", TARGET)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize(
    ("line", "opens"),
    [
        ("int4 group=16", True),
        ("int8 channel", True),
        ("mxfp4", True),
        ("float8_e4m3fn channel", True),
        ("nvfp4", False),
        ("int4 group=16 symmetric=false", False),
        ("float8_e4m3fn block=16x16", False),
    ],
)
def test_experts(family: str, line: str, opens: bool, tmp_path: Path) -> None:
    """Fused experts are written apart, under the names that the family's checkpoints have."""
    found, ours, _ = written(quantized(family, weights=line, target=TARGET), tmp_path / "d", check=True)
    name = "mlp.experts.3.up_proj" if family == "qwen3_moe" else "block_sparse_moe.experts.3.w3"
    assert f"model.layers.1.{name}.weight_scale" in ours
    assert not any("gate_up_proj" in key for key in ours)
    assert found["check"]["weights"] == (24 if opens else 32)  # fused, or one by one
    assert bool(found["check"]["uncalled"]) is not opens


def test_several_schemes(tmp_path: Path) -> None:
    scheme = {
        "rules": [
            {"targets": ["re:.*mlp.*_proj"], "weights": "mxfp4"},
            {"targets": ["re:.*layers.0.*_proj"], "weights": "int8 channel", "inputs": "int8 token"},
            {"targets": ["Linear"], "weights": "float8_e4m3fn channel"},
        ]
    }
    found, _, config = written(_made(tmp_path, scheme=scheme), tmp_path / "d", check=True)
    quantization = config["quantization_config"]
    assert quantization["format"] == "mixed-precision" and len(quantization["config_groups"]) == 3
    assert found["check"]["weights"] == 14 and found["check"]["cosine"] > 0.998


def _made(tmp_path: Path, family: str = "llama", **changes: Any) -> Path:
    from tests.parts.export.folders import model

    from nybble.pipelines.quantize import quantize

    quantize(str(model(family)), "rtn", out=tmp_path / "q", target=TARGET, **changes)
    return tmp_path / "q"


def test_experts_and_the_rest_apart(tmp_path: Path) -> None:
    rules = [{"targets": ["Experts"], "weights": "int4 group=16"}, {"targets": ["Linear"], "weights": "int8 channel"}]
    found, _, config = written(_made(tmp_path, "qwen3_moe", scheme={"rules": rules}), tmp_path / "d", check=True)
    targets = [group["targets"] for group in config["quantization_config"]["config_groups"].values()]
    assert any(target.startswith("re:") and "experts" in target for target in targets[1])
    assert (
        found["check"]["cosine"] > 0.99
    )  # weights are equal in bfloat16, ours are in float32: a token may be routed anew


@pytest.mark.parametrize("recipe", ["gptq", "hqq", "lwc", "best-nvfp4"])
def test_nvfp4_of_any_method_shares_its_global_scale(recipe: str, tmp_path: Path) -> None:
    quick = {"effort": "quick"} if recipe in ("lwc", "best-nvfp4") else {}
    changes = {"weights": "nvfp4", "activations": "none", **quick}
    folder = quantized("llama", recipe, True, target=TARGET, **changes)
    found, ours, _ = written(folder, tmp_path / "d", check=True)
    scales = [ours[f"model.layers.0.self_attn.{n}_proj.weight_global_scale"] for n in "qkv"]
    assert scales[0] == scales[1] == scales[2] and scales[0].log2() % 1 == 0
    assert found["check"]["exact_in"] == "float32" and found["check"]["largest"] == 0


def test_siblings_that_differ_are_refused_with_their_names(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj, .*different global scales of NVFP4"):
        export(quantized(weights="nvfp4"), tmp_path / "d", TARGET)
    scheme = {"rules": [{"targets": ["re:.*k_proj"], "weights": "int8 channel"}, {"weights": "int4 channel"}]}
    with pytest.raises(Exception, match=r"q_proj, .*k_proj, .*v_proj: runtimes join these layers"):
        _made(tmp_path, scheme=scheme)
    assert not (tmp_path / "d").exists() and not (tmp_path / "d.partial").exists()


@pytest.mark.parametrize(
    ("line", "nearest"),
    [
        ("float4_e2m1fn group=32", "nvfp4 or mxfp4"),
        ("nf4 group=32", "int4 group=32"),
        ("float8_e5m2 channel", "float8_e4m3fn channel"),
        ("int4 flat=48", "16, 32, 64"),
        ("int4 group=16 scale=minmax(offset=true)", "symmetric=false"),
    ],
)
def test_what_has_no_word_is_refused_with_the_nearest(line: str, nearest: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as refused:
        export(quantized(weights=line), tmp_path / "d", TARGET)
    assert nearest in str(refused.value) and "model.layers.0.self_attn.q_proj" in str(refused.value)
    with pytest.raises(Exception, match="compressed-tensors can't hold"):
        _made(tmp_path, weights=line)
    assert not (tmp_path / "d").exists()


def test_embeddings_and_a_head_that_reads_them(tmp_path: Path) -> None:
    """The head gets the table too: runtimes know no tied packed weights."""
    folder = quantized("qwen2", weights="int4 group=32", embeddings="int4 group=32", target=TARGET)
    found, ours, config = written(folder, tmp_path / "d", check=True)
    assert config["tie_word_embeddings"] is False
    assert torch.equal(ours["lm_head.weight_packed"], ours["model.embed_tokens.weight_packed"])
    assert found["check"]["weights"] == 16 and found["check"]["cosine"] > 0.999
    assert "no vLLM that is known looks up packed embeddings: model.embed_tokens" in found["notes"]
    assert "vLLM serves it" not in (tmp_path / "d/README.md").read_text()
    found, *_ = written(quantized("qwen2", weights="int4 group=32", target=TARGET), tmp_path / "e")
    assert not found["notes"] and "vLLM serves it" in (tmp_path / "e/README.md").read_text()


def test_an_encoder(tmp_path: Path) -> None:
    found, _, config = written(quantized("bert", weights="int4 group=16", target=TARGET), tmp_path / "d", check=True)
    assert found["check"]["weights"] == 14 and found["check"]["cosine"] > 1 - 1e-6
    assert config["quantization_config"]["ignore"] == []


def test_the_cache(tmp_path: Path) -> None:
    folder = quantized(weights="int4 group=16", kv="float8_e4m3fn token", target=TARGET)
    found, _, config = written(folder, tmp_path / "d", check=True)
    kv = config["quantization_config"]["kv_cache_scheme"]
    assert (kv["type"], kv["num_bits"], kv["strategy"], kv["group_size"], kv["dynamic"]) == (
        "float",
        8,
        "group",
        16,
        True,
    )
    # Not nearer: a sum that a processor takes in another order moves a key over the edge of an E4M3 step, 6 % of it.
    assert found["check"]["cosine"] > 0.98
    folder = quantized(weights="int4 group=16", kv="float8_e4m3fn tensor scale=one", target=TARGET)
    found, ours, config = written(folder, tmp_path / "one", check=True)
    kv = config["quantization_config"]["kv_cache_scheme"]
    assert (kv["type"], kv["num_bits"], kv["strategy"], kv["dynamic"]) == ("float", 8, "tensor", False)
    scales = {name: float(tensor) for name, tensor in ours.items() if name.endswith(("k_scale", "v_scale"))}
    assert len(scales) == 4 and set(scales.values()) == {1.0} and found["check"]["cosine"] > 0.98
    with pytest.raises(SchemeError, match="for all tokens it is E4M3; it takes float8_e4m3fn tensor static"):
        quantize(str(model()), "rtn", weights="int4 group=16", kv="int8 token scale=one", target=TARGET)
    with pytest.raises(SchemeError, match="runtimes measure a scale, and this has none"):
        quantize(str(model()), "rtn", weights="int8 channel", activations="int8 tensor scale=one", target=TARGET)
    with pytest.raises(ModelError, match="no tokens are left in float, scaled together, rotated or sorted"):
        export(quantized(weights="int4 group=16", kv="int8 token residual=8"), tmp_path / "e", TARGET)


def test_a_library_that_is_missing_or_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = quantized(weights="int4 group=16")
    for found, said in (("0.14.1", "0.14.1 is too old"), (None, "needs the package compressed-tensors")):
        library_module.library.cache_clear()
        monkeypatch.setattr(versions_module, "version", _version(found))
        with pytest.raises(UsageError, match=said):
            export(folder, tmp_path / "d", TARGET, check=True)
    library_module.library.cache_clear()


SIDES = [None, {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
         {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}]  # fmt: skip


@pytest.mark.parametrize("inputs", SIDES, ids=["float", "int8", "float8"])
def test_formats_are_the_librarys_choice(inputs: dict[str, Any] | None) -> None:
    """Every pair of arguments that there may be, and the config as its classes dump it."""
    seen = set()
    groups: list[dict[str, Any]] = [{"strategy": "group", "group_size": size} for size in (16, 32, 64)]
    for shared in [{"strategy": "tensor"}, {"strategy": "channel"}, *groups]:
        for bits, kind, dtype in product(range(1, 9), ("int", "float"), (None, torch.uint8)):
            if kind == "float" and bits not in (4, 6, 8):
                continue
            weights = {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False, **shared}
            scheme = {"weights": weights | ({"scale_dtype": dtype} if dtype else {}), "input_activations": inputs}
            theirs = QuantizationScheme(targets=["Linear"], **scheme)
            assert form_of(scheme) == infer_module_format(nn.Linear, theirs).value, scheme
            seen.add(form_of(scheme))
    assert len(seen) == 6 and form_of({"input_activations": inputs}) == "dense"


def _version(found: str | None) -> Any:
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    return version


def test_a_weight_that_was_changed_is_found(tmp_path: Path) -> None:
    folder = quantized(weights="int8 channel")
    export(folder, tmp_path / "d", TARGET)
    path = tmp_path / "d" / "model.safetensors"
    data = bytearray(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begin = header["model.layers.1.mlp.up_proj.weight_packed"]["data_offsets"][0]
    data[8 + int.from_bytes(data[:8], "little") + begin] ^= 1
    path.write_bytes(data)
    with FolderSource(folder) as source, pytest.raises(Exception, match=r"layers.1.mlp.up_proj isn't what was written"):
        get_target(TARGET).verify(tmp_path / "d", source)


def test_the_table_names_a_source_for_every_row() -> None:
    assert all(row.source.startswith("https://") and row.weights for row in TAKES)
    with FolderSource(quantized(weights="int4 group=16")) as source:
        places = placed(source, source.skeleton())
    assert [row.since for row in rows_for(places[0].scheme)] == ["0.5.1"]


def test_places_are_worked_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For notes, writing and checking; on a model of many layers that is what a conversion spends."""
    folder, seen = quantized(weights="int4 group=16"), Mock(wraps=placed)
    monkeypatch.setattr(target_module, "placed", seen)
    export(folder, tmp_path / "d", TARGET, check=True)
    assert seen.call_count == 1


def test_a_packed_head_needs_a_later_vllm(tmp_path: Path) -> None:
    scheme = {"rules": [{"targets": ["Linear"], "weights": "int4 group=32"}], "ignore": []}
    quantize(str(model("mistral")), "rtn", scheme=scheme, target=TARGET, out=tmp_path / "q")
    found = export(tmp_path / "q", tmp_path / "d", TARGET, check=True)
    said = [(row["weights"], row["since"], row["source"].rsplit("/")[-1]) for row in found["check"]["runtimes"]]
    assert said[0][1] == "0.5.1" and said[1:] == [("every scheme above, of `lm_head`", "", "37291")]


@pytest.mark.parametrize(("line", "inputs"), [("nvfp4", ""), ("int4 group=32", ""), ("int8 channel", "int8 token")])
def test_what_transformers_saves_after_a_forward_is_in_float(line: str, inputs: str, tmp_path: Path) -> None:
    more = {"activations": inputs} if inputs else {}
    loaded: Any = AutoModelForCausalLM.from_pretrained(quantized(weights=line, target=TARGET, **more))
    with torch.no_grad():
        loaded(torch.ones(1, 4, dtype=torch.long))
    loaded.save_pretrained(tmp_path / "d")
    source = open_source(str(tmp_path / "d"))
    assert "unpack them at a model's first forward" in source.note and "left out" not in source.note
    assert ("quantized activations too; here they stay in float" in source.note) == bool(inputs)
    ours = source.model(torch.bfloat16).state_dict()
    assert all(torch.equal(ours[name], loaded.state_dict()[name]) for name in ours)


@pytest.mark.parametrize("line", ["int8 channel", "int4 group=32 scale_format=float32"])
def test_scales_have_the_models_dtype(line: str, tmp_path: Path) -> None:
    """Runtimes cast those of integers to it: in float32 they would multiply with others than were calibrated."""
    _, tensors, _ = written(quantized(weights=line, target=TARGET), tmp_path / "d")
    assert {t.dtype for n, t in tensors.items() if n.endswith("weight_scale")} == {torch.bfloat16}


def test_logits_that_are_no_numbers_are_found(tmp_path: Path) -> None:
    folder = shutil.copytree(quantized(weights="int4 group=32", target=TARGET), tmp_path / "q")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FileError, match="the logits of what was written hold NaN or Inf"):
        export(folder, tmp_path / "d", TARGET, check=True)
    assert not (tmp_path / "d").exists()
