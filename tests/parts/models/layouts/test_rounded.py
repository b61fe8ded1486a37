"""Activations and caches that a checkpoint asks to be rounded: as compressed-tensors rounds them, or said not to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp
from safetensors.torch import load_file, save_file
from tests.parts.models.layouts import test_compressed_tensors
from tests.parts.models.layouts import test_modelopt as peer
from torch import Tensor

import nybble
from nybble.checkpoint.account import inspect
from nybble.cli.inspect import command
from nybble.core.errors import FileError, ModelError
from nybble.models.sources.open import open_source
from nybble.nn.kv_model import recorded_kv
from nybble.pipelines.export import export

INT: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True}
FLOAT: dict[str, Any] = {**INT, "type": "float"}
MX = {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
DYNAMIC: dict[str, dict[str, Any]] = {
    "int8 token": {**INT, "strategy": "token"},
    "int4 token": {**INT, "strategy": "token", "num_bits": 4},
    "int8 tensor": {**INT, "strategy": "tensor"},
    "int8 group": {**INT, "strategy": "group", "group_size": 32},
    "int8 token zeros": {**INT, "strategy": "token", "symmetric": False},
    "fp8 token": {**FLOAT, "strategy": "token"},
    "fp8 group": {**FLOAT, "strategy": "group", "group_size": 32},
    "mxfp4": {**FLOAT, **MX, "num_bits": 4},
    "mxfp6": {**FLOAT, **MX, "num_bits": 6},
    "mxfp8": {**FLOAT, **MX},
}
LAYER = "model.layers.0.mlp.up_proj"


def asks(place: Path, side: str, args: dict[str, Any], extra: dict[str, Tensor] | None = None, **more: Any) -> Path:
    """A checkpoint of compressed-tensors that asks for more than its weights."""
    folder, _ = test_compressed_tensors.checkpoint(place, *test_compressed_tensors.CASES["int8 channel"])
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    said = json.loads(QuantizationArgs(**args).model_dump_json()) if args else None
    raw["quantization_config"]["config_groups"]["group_0"][side] = said
    raw["quantization_config"].update(more)
    path.write_text(json.dumps(raw))
    if extra:
        save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors")
    return folder


def layers(folder: Path) -> list[str]:
    return [n.removesuffix(".weight_scale") for n in load_file(folder / "model.safetensors") if "weight_scale" in n]


def inputs() -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 7, 64, generator=g) * torch.rand(2, 7, 1, generator=g) * 4


@pytest.mark.parametrize("name", DYNAMIC)
def test_measured_as_the_library_measures(name: str, tmp_path: Path) -> None:
    folder = asks(tmp_path / "q", "input_activations", DYNAMIC[name])
    model, _ = nybble.load(folder, dtype="float32")
    args, x = QuantizationArgs(**DYNAMIC[name]), inputs()
    wanted = fake_quantize(x, *compute_dynamic_scales_and_zp(x, args, None), args)
    layer: Any = model.get_submodule(LAYER)
    assert torch.equal(layer.inputs(x), wanted) and not torch.equal(wanted, x)
    assert "The checkpoint rounds activations too" in open_source(str(folder)).note


@pytest.mark.parametrize("args", [{**INT}, {**FLOAT}, {**INT, "symmetric": False}], ids=["int8", "fp8", "zeros"])
def test_calibrated_scales(args: dict[str, Any], tmp_path: Path) -> None:
    args = {**args, "strategy": "tensor", "dynamic": False}
    scale, zero = torch.tensor([0.017]), torch.tensor([0 if args["symmetric"] else -21], dtype=torch.int8)
    folder = asks(tmp_path / "q", "input_activations", args)
    parts = {"input_scale": scale} | ({} if args["symmetric"] else {"input_zero_point": zero})
    extra = {f"{n}.{leaf}": t.clone() for n in layers(folder) for leaf, t in parts.items()}
    save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors")
    layer: Any = nybble.load(folder, dtype="float32")[0].get_submodule(LAYER)
    x = inputs()
    assert torch.equal(layer.inputs(x), fake_quantize(x, scale, zero, QuantizationArgs(**args)))
    assert inspect(folder)["total"] == sum(p.stat().st_size for p in folder.iterdir())
    save_file({k: t for k, t in load_file(folder / "model.safetensors").items() if k != f"{LAYER}.input_scale"},
              folder / "model.safetensors")  # fmt: skip
    with pytest.raises(FileError, match=r"up_proj\.input_scale"):
        nybble.load(folder)


@pytest.mark.parametrize("above", ["divisor", "factor"])
def test_inputs_of_nvfp4_under_a_calibrated_number(above: str, tmp_path: Path) -> None:
    """compressed-tensors' divisor, ModelOpt's factor; as the library rounds, and written again as they were."""
    args = {**FLOAT, "num_bits": 4, "strategy": "tensor_group", "group_size": 16, "dynamic": "local",
            "scale_dtype": torch.float8_e4m3fn}  # fmt: skip
    divisor = torch.tensor([448 * 6 / 8.0])
    if above == "divisor":
        leaf, target, stored = "input_global_scale", "compressed-tensors", divisor
        folder = asks(tmp_path / "q", "input_activations", args)
    else:
        leaf, target, stored = "input_scale", "modelopt", (1 / divisor).reshape(())
        folder, _ = peer.checkpoint(tmp_path / "q", "NVFP4")
    path = folder / "model.safetensors"
    tensors = load_file(path) | {f"{name}.{leaf}": stored.clone() for name in layers(folder)}
    save_file(tensors, path, {"format": "pt"})
    layer: Any = nybble.load(folder, dtype="float32")[0].get_submodule(LAYER)
    x, said = inputs(), QuantizationArgs(**args)
    scale, zero = compute_dynamic_scales_and_zp(x, said, torch.nn.Module(), global_scale=divisor)
    assert torch.equal(layer.inputs(x), fake_quantize(x, scale, zero, said, global_scale=divisor))
    found = export(folder, tmp_path / "back", target)
    again = load_file(tmp_path / "back/model.safetensors")
    assert torch.equal(again[f"{LAYER}.{leaf}"], stored) and not any("in float" in note for note in found["notes"])
    tensors[f"{LAYER}.{leaf}"] *= 2
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"gate_proj, \S+up_proj: different global scales of inputs"):
        export(folder, tmp_path / "unequal", target)
    tensors[f"{LAYER}.{leaf}"] *= 0
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(FileError, match=rf"up_proj\.{leaf} is 0\.0; a positive number"):
        nybble.load(folder)
    save_file({k: t for k, t in tensors.items() if not k.endswith(leaf)}, path, {"format": "pt"})
    with pytest.warns(UserWarning, match="quantized activations too.*stay in float"):
        assert nybble.load(folder)[0].get_submodule(LAYER).inputs is None


def test_outputs_and_the_way_back(tmp_path: Path) -> None:
    """What is read is written again: the config of the exported folder asks for the same."""
    folder = asks(tmp_path / "q", "input_activations", DYNAMIC["int8 token"])
    export(folder, tmp_path / "back", "compressed-tensors")
    groups = json.loads((tmp_path / "back/config.json").read_text())["quantization_config"]["config_groups"]
    (group,) = groups.values()
    said = group["input_activations"]
    assert (said["num_bits"], said["type"], said["strategy"], said["dynamic"]) == (8, "int", "token", True)
    folder = asks(tmp_path / "out", "output_activations", DYNAMIC["fp8 token"])
    layer: Any = nybble.load(folder, dtype="float32")[0].get_submodule(LAYER)
    assert layer.inputs is None and str(layer.outputs.quantizer) == "float8_e4m3fn token"
    found = export(folder, tmp_path / "out again", "compressed-tensors")
    groups = json.loads((tmp_path / "out again/config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["output_activations"]["strategy"] for group in groups.values()] == ["token"]
    assert not any("in float" in note or "does not" in note for note in found["notes"])


def test_caches(tmp_path: Path) -> None:
    cache = {**FLOAT, "strategy": "tensor", "dynamic": False}
    scales = {f"model.layers.{i}.self_attn.{s}_scale": torch.ones(1) for i in (0, 1) for s in "kv"}
    folder = asks(tmp_path / "q", "input_activations", {}, scales, kv_cache_scheme=cache)
    assert str(recorded_kv(nybble.load(folder)[0])) == "float8_e4m3fn scale=one"
    group = {**FLOAT, "strategy": "group", "group_size": 16}
    folder = asks(tmp_path / "g", "input_activations", {}, kv_cache_scheme=group)
    assert "group=16" in str(recorded_kv(nybble.load(folder)[0]))
    export(folder, tmp_path / "back", "compressed-tensors")
    again = json.loads((tmp_path / "back/config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (again["type"], again["group_size"], again["dynamic"]) == ("float", 16, True)
    some = {n: torch.tensor(0.25 if "k_" in n else 0.5) for n in scales if ".1." in n}  # of layer 0, which is 1, none
    folder = asks(tmp_path / "c", "input_activations", {}, some, kv_cache_scheme=cache)
    found: Any = recorded_kv(nybble.load(folder)[0])
    assert (found["model.layers.1.self_attn"].keys.scale.value, str(found["model.layers.0.self_attn"])) == (
        0.25,
        "float8_e4m3fn scale=one",
    )
    for number, (value, error) in enumerate(((0.0, "no positive number"), (float("nan"), "no positive number"))):
        bad = {n: t * value for n, t in scales.items()}
        with pytest.raises(FileError, match=error):
            nybble.load(asks(tmp_path / f"bad{number}", "input_activations", {}, bad, kv_cache_scheme=cache))
    alone = {n: t for n, t in scales.items() if "k_" in n}
    with pytest.warns(UserWarning, match="the KV cache too.*stay in float"):
        folder = asks(tmp_path / "alone", "input_activations", {}, alone, kv_cache_scheme=cache)
        assert recorded_kv(nybble.load(folder)[0]) is None


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_caches_of_modelopt(scale: float, tmp_path: Path) -> None:
    """Scales of 1 are E4M3 as it is; calibrated ones are each attention's."""
    folder, _ = peer.checkpoint(tmp_path / "q", "FP8", apart=True)
    names = [f"model.layers.{i}.self_attn.{s}_proj.{s}_scale" for i in (0, 1) for s in "kv"]
    extra = {name: torch.tensor(scale) for name in names}
    save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors", {"format": "pt"})
    source: Any = open_source(str(folder))
    line = "float8_e4m3fn token scale=fixed(value=0.5)"
    each = {f"model.layers.{i}.self_attn": f"keys=({line}) values=({line})" for i in (0, 1)}
    assert source.rounded.kv == ("float8_e4m3fn tensor scale=one" if scale == 1 else each)
    assert "rounds the KV cache too" in source.note


def test_what_is_left_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local = {**FLOAT, "num_bits": 4, "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}
    folder = asks(tmp_path / "q", "input_activations", local)
    with pytest.warns(UserWarning, match="activations too.*stay in float") as said:
        model, _ = nybble.load(folder)
    layer: Any = model.get_submodule(LAYER)
    assert layer.inputs is None and len(said) == 1 and "activations" in inspect(folder)["note"]
    command(str(folder))
    assert capsys.readouterr().out.count(inspect(folder)["note"]) == 1


@pytest.mark.parametrize(("kind", "name"), [("FP8_PER_CHANNEL_PER_TOKEN", "fp8 token"), ("MXFP8", "mxfp8")])
def test_measured_inputs_of_modelopt(kind: str, name: str, tmp_path: Path) -> None:
    folder, _ = peer.checkpoint(tmp_path / "q", kind)
    layer: Any = nybble.load(folder, dtype="float32")[0].get_submodule(LAYER)
    x, args = inputs(), QuantizationArgs(**DYNAMIC[name])
    assert torch.equal(layer.inputs(x), fake_quantize(x, *compute_dynamic_scales_and_zp(x, args, None), args))


def test_calibrated_inputs_of_modelopt(tmp_path: Path) -> None:
    """Of several algorithms each module has its own; inputs that are multiplied first stay in float, and it is said."""
    folder, wanted = peer.checkpoint(tmp_path / "q", "W8A8_SQ_PER_CHANNEL")
    tensors = load_file(folder / "model.safetensors")
    names = [name.removesuffix(".weight") for name in wanted]
    tensors |= {f"{name}.input_scale": torch.tensor(0.017) for name in names}
    gate = LAYER.replace("up_proj", "gate_proj")
    tensors[f"{gate}.pre_quant_scale"] = torch.rand(64) + 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    layers = {name: {"quant_algo": "W8A16" if "q_proj" in name else "W8A8_SQ_PER_CHANNEL"} for name in names}
    raw["quantization_config"] |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.warns(UserWarning, match="activations too.*stay in float"):
        model: Any = nybble.load(folder, dtype="float32")[0]
    x, args = inputs(), QuantizationArgs(**{**INT, "strategy": "tensor", "dynamic": False})
    found = model.get_submodule(LAYER).inputs(x)
    assert torch.equal(found, fake_quantize(x, torch.tensor([0.017]), torch.zeros(1, dtype=torch.int8), args))
    assert model.get_submodule(gate).inputs is None
    assert model.get_submodule("model.layers.0.self_attn.q_proj").inputs is None
    tensors[f"{LAYER}.input_scale"] = torch.tensor(-1.0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FileError, match=r"up_proj\.input_scale is -1"):
        nybble.load(folder)
