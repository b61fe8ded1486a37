"""MLX's bytes as mlx packed them, its arithmetic, and mlx and mlx-lm themselves where they are installed."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.parts.export.folders import model, quantized
from tests.parts.models.layouts.test_mlx import GOLDEN, NAMES, checkpoint, golden
from torch import Tensor

from nybble.core.errors import FileError, ModelError, SchemeError, UsageError
from nybble.export import _mlx_verify, get_target
from nybble.export._mlx_form import form_of, repeated
from nybble.export._mlx_layers import as_read
from nybble.export._mlx_takes import TAKES
from nybble.export._mlx_tensors import affine, exact_in, global_scale, packed_words
from nybble.export._source import FolderSource
from nybble.models.sources.layouts.mlx import made
from nybble.pipelines.export import export
from nybble.pipelines.quantize import quantize
from nybble.quantizer import Quantizer

needs_mlx = pytest.mark.skipif(
    find_spec("mlx_lm") is None, reason="the oracle of MLX folders: pip install mlx mlx-cpu mlx-lm"
)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_mlx(name: str) -> None:
    tensors, how = golden(name)
    rows, columns = GOLDEN[f"{name}.values"].shape
    tensor = made(tensors, how, (rows, columns))
    form = form_of(tensor, experts="global_scale" in tensors)
    assert (form.mode, form.bits) == (how.mode, how.bits)
    assert torch.equal(packed_words(tensor, form).view(torch.int32), tensors["weight"].view(torch.int32).reshape(-1))
    if how.mode == "affine":
        assert form.group == how.group and exact_in(tensor, form, tensors["scales"].dtype)
        scales, biases = affine(tensor, form)
        assert torch.equal(repeated(scales, form, (rows, columns)), tensors["scales"].double())
        assert torch.equal(repeated(biases, form, (rows, columns)), tensors["biases"].double())
    elif "global_scale" in tensors:
        assert global_scale(float(tensors["global_scale"]) / 2688) is not None


@pytest.mark.parametrize(
    ("line", "said", "dtype"),
    [
        ("int4 group=32 scale_format=bfloat16", (4, 32), torch.bfloat16),
        ("int4_full group=128", (4, 128), torch.float16),
        ("int8 channel scale_format=float16", (8, 64), torch.float16),
        ("int7 group=64", (8, 64), torch.float16),
        ("int5 tensor scale_format=bfloat16", (5, 64), torch.bfloat16),
        ("uint3 group=32 scale=minmax(offset=true)", (3, 32), torch.float16),
        ("uint6 group=64 scale=minmax(offset=true) scale_format=float32 offset_format=float32", (6, 64), torch.float32),
        ("int6 group=32 symmetric=false scale_format=bfloat16", (6, 32), torch.float32),
        ("int8 group=64 symmetric=false", (8, 64), torch.float32),
        ("int3 group=32 scale=minmax(offset=true) scale_format=bfloat16", (3, 32), torch.float32),
        ("ternary channel packing=base3 scale_format=bfloat16", (2, 64), torch.bfloat16),
        ("binary group=64 scale=mean", (1, 64), torch.float16),
        ("table[-1,0,1,2] group=64 scale=least-squares", (2, 64), torch.float16),
        ("int4 block=4x32", (4, 32), torch.float16),
        ("int4 flat=64 scale=mse", (4, 64), torch.float16),
        ("bfp12", (4, 32), torch.bfloat16),
        ("q4_1", (4, 32), torch.float16),
        ("int8 group=64 center=mean", (8, 64), None),
        ("int4 group=32 scale_format=float32", (4, 32), None),
    ],
)
def test_integers_keep_every_value(line: str, said: tuple[int, int], dtype: torch.dtype | None) -> None:
    """Calculated as mlx does, a product and a sum in float32; ``dtype``: the narrowest that holds scales and biases."""
    x = torch.randn(12, 384 if said[1] == 128 else 192, generator=torch.Generator().manual_seed(0))
    tensor = Quantizer(line).quantize(x)
    form = form_of(tensor)
    assert (form.mode, form.bits, form.group) == ("affine", *said)
    fits = [one for one in (torch.bfloat16, torch.float16, torch.float32) if exact_in(tensor, form, one)]
    assert (fits[0] if fits else None) == dtype
    if dtype is None:
        return
    codes = _unpacked(packed_words(tensor, form), form.bits).view(12, -1, form.group)
    scales, biases = (
        repeated(part, form, (12, x.shape[1])).to(dtype).float()[..., None] for part in affine(tensor, form)
    )
    assert torch.equal((codes * scales + biases).flatten(1), tensor.dequantize())


def _unpacked(words: Tensor, bits: int) -> Tensor:
    import numpy as np

    found = np.unpackbits(words.view(torch.uint8).numpy(), bitorder="little").reshape(-1, bits)
    return torch.from_numpy(found @ (1 << np.arange(bits))).float()


def test_a_bias_that_would_be_rounded_is_not_written() -> None:
    """-zero point * scale has 8 + 4 digits here, of which bfloat16 keeps 8."""
    x = torch.rand(16, 32, generator=torch.Generator().manual_seed(1)) - 0.3
    tensor = Quantizer("int4 group=32 symmetric=false scale_format=bfloat16").quantize(x)
    form = form_of(tensor)
    scale, bias = affine(tensor, form)
    assert torch.equal(scale.bfloat16().double(), scale) and not torch.equal(bias.bfloat16().double(), bias)
    assert not exact_in(tensor, form, torch.bfloat16) and exact_in(tensor, form, torch.float32)


@pytest.mark.parametrize("kind", ["affine-3-32", "affine-8-32", "mixed", "mxfp4-4-32", "mxfp8-8-32", "nvfp4-4-16"])
def test_there_and_back_keeps_every_byte(kind: str, tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "q", kind)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    export(folder, tmp_path / "back", "mlx")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.endswith((".weight", ".scales", ".biases")) and tensor.ndim == 2:
            same = torch.equal(tensor.reshape(-1).view(torch.uint8), after[name].reshape(-1).view(torch.uint8))
            assert same and tensor.dtype == after[name].dtype, name
    again = json.loads((tmp_path / "back/config.json").read_text())
    assert again["quantization"] == config["quantization"] == again["quantization_config"]


@needs_mlx
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"weights": "int4 group=32", "embeddings": "int8 group=32", "target": "mlx"}),
        ("llama", {"weights": "int3 group=32 symmetric=false"}),
        ("qwen3_moe", {"weights": "mxfp4", "target": "mlx"}),  # NVFP4's experts have a global scale: on Metal alone
    ],
)
def test_mlx_lm_runs_it(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Both sides in float32: nothing but the order of sums differs."""
    found = export(quantized(family, **changes), tmp_path / "d", "mlx", check=True)
    checked = found["check"]
    assert checked["weights"] == {"llama": 14 + ("embeddings" in changes), "qwen3_moe": 32}[family]
    assert not checked["uncalled"] and checked["largest"] < 1e-5 and checked["exact_in"] == "float32"
    assert bool(found["notes"]) is ("target" not in changes)
    assert {row["form"] for row in checked["runtimes"]} == ({"mxfp4"} if family == "qwen3_moe" else {"affine"})


@needs_mlx
def test_a_weight_that_was_changed_is_found(tmp_path: Path) -> None:
    folder = quantized(weights="int4 group=32", target="mlx")
    export(folder, tmp_path / "d", "mlx")
    path = tmp_path / "d/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.biases"][0, 0] += 1
    save_file(tensors, path)
    with FolderSource(folder) as source, pytest.raises(FileError, match="up_proj isn't what was written"):
        get_target("mlx").verify(tmp_path / "d", source)


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("int4 group=32", "int4 group=32 scale_format=bfloat16"),
        (
            "int4 group=32 symmetric=false",
            "uint4 group=32 scale=minmax(offset=true) scale_format=bfloat16 offset_format=bfloat16",
        ),
        ("nvfp4", "float4_e2m1fn group=16 scale_format=(float8_e4m3fn scale=one)"),
        ("nvfp4-ct", "float4_e2m1fn group=16 scale_format=(float8_e4m3fn scale=one)"),
        ("mxfp4-mlx", "float4_e2m1fn group=32 scale=pow2(mode=nearest) scale_format=(float8_e8m0fnu scale=one)"),
        ("ternary group=32 packing=base3", "ternary group=32 scale_format=bfloat16"),
    ],
)
def test_a_scheme_is_kept_to_what_mlx_holds(line: str, kept: str, tmp_path: Path) -> None:
    """In the model's dtype, and so written."""
    quantize(str(model()), "rtn", out=tmp_path / "q", weights=line, target="mlx")
    assert json.loads((tmp_path / "q/nybble.json").read_text())["recipe"]["scheme"]["rules"][0]["weights"] == kept
    found = export(tmp_path / "q", tmp_path / "d")
    assert found["target"] == "mlx" and found["notes"] == []
    tensors = load_file(tmp_path / "d/model.safetensors")
    wanted = torch.uint8 if kept.startswith("float4") else torch.bfloat16
    assert tensors["model.layers.0.mlp.up_proj.scales"].dtype == wanted


def test_experts_keep_their_global_scale(tmp_path: Path) -> None:
    """The rest has none; ours is a power of two, which MLX's division by 2688 gives."""
    folder = quantized("qwen3_moe", weights="nvfp4", target="mlx")
    export(folder, tmp_path / "d", "mlx")
    tensors = load_file(tmp_path / "d/model.safetensors")
    found = tensors["model.layers.1.mlp.switch_mlp.down_proj.global_scale"]
    assert found.shape == (4,) and bool(((found / 2688).log2() % 1 == 0).all())
    assert sorted(name for name in tensors if name.endswith("global_scale"))[0].startswith("model.layers.0.mlp.switch")
    assert tensors["model.layers.1.mlp.switch_mlp.up_proj.weight"].shape == (4, 32, 8)
    config = json.loads((tmp_path / "d/config.json").read_text())
    assert config["num_experts"] == 4 and config["rope_theta"] == 10000.0
    assert config["quantization"]["model.layers.0.mlp.switch_mlp.gate_proj"]["global_scale"] is True


@pytest.mark.parametrize(
    ("line", "nearest"),
    [
        ("nf4 group=32", r"it takes uint4 group=32 scale=minmax\(offset=true\)"),
        ("float4_e2m1fn group=32", "it takes mxfp4"),
        ("float8_e5m2 channel", "it takes mxfp8"),
        ("int4 group=16", r"16 columns share a scale.*it takes int4 group=32"),
        ("int4 group=48", r"48 columns share a scale|no multiple of 48"),
    ],
)
def test_what_mlx_has_not_is_refused_with_the_nearest(line: str, nearest: str, tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match=rf"(?s)model\.layers\.0.*{nearest}|does not divide"):
        quantize(str(model()), "rtn", weights=line, target="mlx", out=tmp_path / "q")
    if line != "int4 group=48":
        with pytest.raises(ModelError, match=rf"(?s)layers\.0\.self_attn\.q_proj.*{nearest}"):
            export(quantized(weights=line), tmp_path / "d", "mlx")
    assert not list(tmp_path.iterdir())


def test_what_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="no quantizer of activations"):
        quantize(str(model()), "rtn", weights="mxfp8", activations="mxfp8", target="mlx", out=tmp_path / "q")
    with pytest.raises(ModelError, match=r"a Conv1D.*--ignore Conv1D"):
        export(quantized("gpt2", weights="int4 group=32"), tmp_path / "d", "mlx")
    with pytest.raises(ModelError, match="no scale over NVFP4's scales"):
        export(quantized(weights="nvfp4"), tmp_path / "d", "mlx")
    assert not list(tmp_path.iterdir())


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    _mlx_verify.library.cache_clear()
    monkeypatch.setattr(_mlx_verify, "version", version)
    with pytest.raises(UsageError, match="pip install mlx mlx-lm"):
        export(quantized(weights="mxfp4"), tmp_path / "d", "mlx", check=True)
    assert not list(tmp_path.iterdir())


def test_older_keys_stand_beside_those_of_transformers() -> None:
    class Of:
        config = type("Config", (), {"attribute_map": {"num_experts": "num_local_experts"}})()

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    found = as_read({"rope_parameters": rope, "num_local_experts": 4, "rms_norm_eps": 1e-6}, Of())
    assert found["rope_theta"] == 5e5 and found["num_experts"] == 4 and found["rope_parameters"] == rope
    assert found["rope_scaling"] == {"type": "llama3", "rope_type": "llama3", "factor": 8.0}
    kinds = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    types = ["sliding_attention", "full_attention"] * 2
    found = as_read({"rope_parameters": kinds, "layer_types": types}, Of())
    assert (found["rope_theta"], found["rope_local_base_freq"], found["sliding_window_pattern"]) == (1e6, 1e4, 2)
    assert "sliding_window_pattern" not in as_read({"layer_types": [*types, "full_attention"]}, Of())


def test_the_table_has_a_row_for_every_mode() -> None:
    assert [row.form for row in TAKES] == ["affine", "mxfp4", "mxfp8", "nvfp4"]
