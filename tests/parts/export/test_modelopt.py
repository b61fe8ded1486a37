"""ModelOpt's folders, judged by ModelOpt: what it writes is read as it reads it, what is written it reads as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.parts.export.folders import model
from tests.tiny import save_tiny

import nybble
from nybble.core.errors import SchemeError
from nybble.export._mo_tensors import _row_pairs
from nybble.models.sources.open import open_source
from nybble.nn.kv_model import recorded_kv
from nybble.pipelines.convert import convert
from nybble.pipelines.export import export
from nybble.pipelines.quantize import quantize
from nybble.quantizer import Quantizer

PEER = Path(__file__).with_name("modelopt_peer.py")
HOW = "pip install nvidia-modelopt (0.47; with omegaconf, pulp, scipy, nvidia-ml-py)"
#: form -> weights, inputs, calibrated
OURS: dict[str, tuple[str, str, bool]] = {
    "W4A16_NVFP4": ("nvfp4", "", False),
    "NVFP4": ("nvfp4", "nvfp4", True),
    "W4A8_NVFP4_FP8": ("nvfp4", "float8_e4m3fn tensor static", True),
    "FP8": ("float8_e4m3fn tensor", "float8_e4m3fn tensor static", True),
    "FP8_PER_CHANNEL_PER_TOKEN": ("float8_e4m3fn channel", "float8_e4m3fn token", False),
    "fp8_pb_wo": ("float8_e4m3fn block=128x128", "", False),
    "MXFP8": ("mxfp8", "mxfp8", False),
    "mxfp4": ("mxfp4", "", False),
    "W4A16_AWQ": ("int4 group=128", "", False),
    "W8A16": ("int8 channel", "", False),
    "W8A8_SQ_PER_CHANNEL": ("int8 channel", "int8 tensor static", True),
}
WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A room with the float model (``float``), ours (``FORM``), and what ModelOpt makes of both (``theirs``)."""
    room = tmp_path_factory.mktemp("modelopt")
    save_tiny(room / "float", "llama", **WIDE, num_key_value_heads=4, attention_bias=False)
    text = room / "text.txt"
    text.write_text("ba be bi bo bu ca ce ci co cu " * 200)
    for form, (weights, inputs, calibrated) in OURS.items():
        data: dict[str, Any] = {"data": str(text), "settings": {"seq_len": 32, "samples": 2}} if calibrated else {}
        rounds: dict[str, Any] = {"activations": inputs} if inputs else {}
        quantize(
            str(room / "float"), "rtn", out=room / f"q-{form}", weights=weights, target="modelopt", **rounds, **data
        )
        export(room / f"q-{form}", room / form, check=True)
    yield room


@pytest.fixture(scope="module")
def judged(made: Path) -> Path:
    """Where ModelOpt has written."""
    if find_spec("modelopt") is None:
        pytest.skip(HOW)
    (made / "theirs").mkdir()
    ours = [str(made / form) for form in OURS]
    command = [sys.executable, str(PEER), str(made / "float"), str(made / "theirs"), *ours]
    subprocess.run(command, check=True, capture_output=True)
    return made / "theirs"


def test_what_modelopt_writes_is_read_as_it_reads_it(judged: Path) -> None:
    folders = [folder for folder in judged.iterdir() if folder.is_dir()]
    assert len(folders) == 11
    for folder in folders:
        wanted = load_file(judged / f"{folder.name}.safetensors")
        found = open_source(str(folder)).load(list(wanted), dtype=torch.float32)
        assert len(wanted) == 7
        for name, value in wanted.items():
            assert torch.equal(found[name], value), (folder.name, name)


def test_what_is_written_modelopt_reads(made: Path, judged: Path) -> None:
    for form in OURS:
        wanted, ours = load_file(judged / f"{form}.safetensors"), nybble.load(made / f"q-{form}", dtype="float32")[0]
        for name, value in wanted.items():
            layer: Any = ours.get_submodule(name.removesuffix(".weight"))
            assert torch.equal(layer.weight(torch.float32), value), (form, name)
        theirs = json.loads((judged / f"{form}.json").read_text())
        assert json.loads((made / form / "config.json").read_text())["quantization_config"] == theirs, form


def test_its_folders_keep_every_byte(judged: Path, tmp_path: Path) -> None:
    """Read and written again, inputs' scales and the description too."""
    for name in ("NVFP4_DEFAULT_CFG", "W4A16_NVFP4_CFG", "FP8_DEFAULT_CFG", "MXFP8_DEFAULT_CFG", "INT8_DEFAULT_CFG"):
        folder, back = judged / name, tmp_path / name
        assert not convert(folder, back, "modelopt")["rounded"]
        before, after = load_file(folder / "model.safetensors"), load_file(back / "model.safetensors")
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert tensor.shape == after[key].shape and tensor.dtype == after[key].dtype, key
            assert torch.equal(tensor.flatten().view(torch.uint8), after[key].flatten().view(torch.uint8)), key
        said = [json.loads((place / "hf_quant_config.json").read_text()) for place in (folder, back)]
        assert said[0]["quantization"] == said[1]["quantization"]


def test_its_kv_cache_has_our_scales(made: Path, judged: Path, tmp_path: Path) -> None:
    """Calibrated on the same tokens: alike in name, shape, dtype and value; and read from its files."""
    fp8 = "float8_e4m3fn tensor"
    quantize(
        str(made / "float"), "rtn", torch.arange(32)[None], out=tmp_path / "q", weights=fp8,
        activations=f"{fp8} static", kv=f"{fp8} static", target="modelopt",
    )  # fmt: skip
    export(tmp_path / "q", tmp_path / "d", check=True)
    theirs, ours = (
        {n: t for n, t in load_file(place / "model.safetensors").items() if n.endswith(("k_scale", "v_scale"))}
        for place in (judged.with_name("cached"), tmp_path / "d")
    )
    assert len(theirs) == 2 and ours.keys() == theirs.keys()
    for name, scale in theirs.items():
        assert (scale.shape, scale.dtype) == (ours[name].shape, ours[name].dtype) and torch.equal(scale, ours[name])
    said = [json.loads((p / "hf_quant_config.json").read_text()) for p in (judged.with_name("cached"), tmp_path / "d")]
    assert said[0]["quantization"] == said[1]["quantization"]
    places = (judged.with_name("cached"), tmp_path / "d", tmp_path / "q")
    read = [recorded_kv(nybble.load(place)[0]) for place in places]
    assert read[0] is not None and read[0] == read[1] == read[2]


def test_forms(made: Path) -> None:
    """Each scheme comes out as the algorithm that says it; siblings share NVFP4's factor and FP8's scale."""
    for form, (_, inputs, calibrated) in OURS.items():
        said = json.loads((made / form / "hf_quant_config.json").read_text())["quantization"]
        assert said["quant_algo"] == form and said["exclude_modules"] == ["lm_head", "model.embed_tokens"]
        tensors = load_file(made / form / "model.safetensors")
        assert sum(name.endswith("input_scale") for name in tensors) == (7 if calibrated else 0), (form, inputs)
        if form in ("W4A16_NVFP4", "FP8"):
            leaf = "weight_scale_2" if "NVFP4" in form else "weight_scale"
            scales = [float(tensors[f"model.layers.0.self_attn.{n}_proj.{leaf}"]) for n in "qkvo"]
            assert scales[0] == scales[1] == scales[2] != scales[3]


def test_several_formats_in_one_model(tmp_path: Path) -> None:
    """MIXED_PRECISION names every layer; experts go apart under their own names."""
    rules = [
        {"targets": ["Experts"], "weights": "nvfp4"},
        {"targets": ["Linear"], "weights": "float8_e4m3fn channel", "inputs": "float8_e4m3fn token"},
    ]
    quantize(str(model("qwen3_moe")), "rtn", out=tmp_path / "q", scheme={"rules": rules})
    export(tmp_path / "q", tmp_path / "d", "modelopt", check=True)
    said = json.loads((tmp_path / "d" / "hf_quant_config.json").read_text())["quantization"]
    layers = said["quantized_layers"]
    assert said["quant_algo"] == "MIXED_PRECISION"
    assert layers["model.layers.0.mlp.experts.3.up_proj"] == {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    assert "model.layers.0.mlp.gate" not in layers and len(layers) == 2 * (4 + 4 * 3)
    assert layers["model.layers.1.self_attn.q_proj"] == {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}


@pytest.mark.parametrize(
    ("weights", "activations", "said"),
    [
        ("nvfp4", "mxfp4", r"float4_e2m1fn group=16 .*with inputs .*it takes nvfp4 with inputs in float"),
        ("nvfp4-ct", "", "divided by a number, and ModelOpt multiplies; it takes nvfp4|two-level.*it takes nvfp4"),
        ("int4 group=32 symmetric=false", "", "it takes nvfp4 with inputs in float"),
        ("float8_e4m3fn tensor", "", "it takes nvfp4 with inputs in float"),
    ],
)
def test_what_it_cannot_hold(weights: str, activations: str, said: str, tmp_path: Path) -> None:
    rounds: dict[str, Any] = {"activations": activations} if activations else {}
    with pytest.raises(SchemeError, match=f"(?s)ModelOpt can't hold .*({said})"):
        nybble.quantize(str(model()), "rtn", weights=weights, target="modelopt", **rounds)


def test_nvfp4_alone(tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="FP8_PER_CHANNEL_PER_TOKEN"):
        nybble.quantize(
            str(model()), "rtn", weights="float8_e4m3fn channel", activations="float8_e4m3fn token",
            target="modelopt-nvfp4",
        )  # fmt: skip
    with pytest.raises(SchemeError, match="KV cache"):
        nybble.quantize(str(model()), "rtn", weights="nvfp4", kv="int8 token", target="modelopt-nvfp4")


@pytest.mark.parametrize("columns", [6, 7])
def test_pairs_of_rows(columns: int) -> None:
    """The first of two rows in the low nibble, in rows that fill no byte too."""
    values = torch.randint(-7, 8, (4, columns), generator=torch.Generator().manual_seed(0))
    values[:, 0] = 7
    made: Any = Quantizer("int4 channel").quantize(values.float())
    found = _row_pairs(made)
    assert torch.equal(torch.stack([found & 15, found >> 4], 1).flatten(0, 1).to(torch.int64), values & 15)
