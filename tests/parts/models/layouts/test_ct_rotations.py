"""Checkpoints with a transform_config that compressed-tensors itself applied, compressed and wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle import apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.transform import TransformConfig, apply_transform_config
from safetensors.torch import load_file, save_file
from tests.parts.models.layouts.peers import linears, llama, write
from tests.tiny import logits
from torch import Tensor

import nybble
from nybble.checkpoint.account import inspect
from nybble.core.errors import FileError, ModelError
from nybble.models.sources.open import open_source
from nybble.nn.rotated_linear import RotatedQuantLinear
from nybble.pipelines.convert import convert

ENDS = ["re:.*down_proj$"]


def both(kind: str, targets: list[str], **more: Any) -> dict[str, Any]:
    """A scheme of an input and of the weight that it meets."""
    sides = (("input", False), ("weight_input", True))
    apply = [{"targets": targets, "location": at, "inverse": i, "ignore": ["lm_head"]} for at, i in sides]
    return {"type": kind, "apply": apply, "head_dim": None, **more}


CASES: dict[str, dict[str, Any]] = {
    "hadamard": {"R4": both("hadamard", ENDS)},
    "blocks": {"v": both("hadamard", ["Linear"], head_dim=32)},
    "random": {"v": both("random-hadamard", ["Linear"], head_dim=16)},
    "random, of two widths": {"v": both("random-hadamard", ["Linear"])},
    "offline too": {
        "R2": {
            "type": "hadamard", "head_dim": 16,
            "apply": [
                {"targets": ["re:.*v_proj$"], "location": "weight_output"},
                {"targets": ["re:.*o_proj$"], "location": "weight_input", "inverse": True},
            ],
        },
        "R4": both("hadamard", ENDS, head_dim=16),
    },
}  # fmt: skip


@torch.no_grad()
def checkpoint(folder: Path, groups: dict[str, Any]) -> tuple[Path, Tensor]:
    """A folder, and the logits that the library comes to."""
    model: Any = llama(torch.float32, tie_word_embeddings=False, intermediate_size=128)
    transforms = TransformConfig(config_groups=groups)
    apply_transform_config(model, transforms)
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format="pack-quantized")
    apply_quantization_config(model, config)
    layers: dict[str, Any] = dict(linears(model))
    for module in layers.values():
        cut = module.weight.reshape(len(module.weight), -1, 32)
        scale, _ = calculate_qparams(cut.amin(-1), cut.amax(-1), weights)
        module.weight_scale.data.copy_(scale)
    wanted = logits(model)
    ModelCompressor(quantization_config=config).compress_model(model)
    tensors, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():  # what is shared is written once
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    said = {**json.loads(config.model_dump_json()), "quant_method": "compressed-tensors"}
    said["transform_config"] = json.loads(transforms.model_dump_json())
    return write(folder, model, tensors, said), wanted


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_librarys_own(name: str, tmp_path: Path) -> None:
    folder, wanted = checkpoint(tmp_path / "ct", CASES[name])
    model, _ = nybble.load(folder, dtype="float32")
    bound = 1e-5 * float(wanted.abs().max())
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=bound)
    rotated = sum(isinstance(m, RotatedQuantLinear) for m in model.modules())
    assert rotated == (2 if "R4" in CASES[name] else 14)
    plain = open_source(str(folder)).model(torch.float32, torch.device("cpu"))  # the float model that it stands for
    torch.testing.assert_close(logits(plain), wanted, rtol=0, atol=bound)


def test_it_goes_on_to_other_files(tmp_path: Path) -> None:
    folder, wanted = checkpoint(tmp_path / "ct", CASES["random"])
    found = convert(folder, tmp_path / "again", "compressed-tensors", check=True)
    assert not found["rounded"] and found["check"]["cosine"] > 1 - 1e-6
    nybble.save(nybble.load(folder, dtype="float32")[0], tmp_path / "own")
    for place in ("again", "own"):
        bound = 1e-5 * float(wanted.abs().max())
        torch.testing.assert_close(
            logits(nybble.load(tmp_path / place, dtype="float32")[0]), wanted, rtol=0, atol=bound
        )
    with pytest.raises(ModelError, match="online rotation"):
        convert(folder, tmp_path / "gguf", "gguf")
    rows = inspect(folder)["formats"]
    assert [row["weights"] for row in rows] == [14] and "behind a rotation of 16 channels" in rows[0]["format"]
    assert inspect(folder)["bytes"]["tables"] == 14 * 16 + 16 * 16 * 4  # shapes, and one matrix


def test_what_is_not_ours_is_refused(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "ct", CASES["random"])
    path, tensors = folder / "config.json", load_file(folder / "model.safetensors")
    original = path.read_text()
    (key,) = (name for name in tensors if name.endswith("v_input.weight"))
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda g: g["apply"][0].update(location="output"), ModelError, "transforms output by random-hadamard"),
        (lambda g: g["apply"][0].update(location="q_attn"), ModelError, "transforms q_attn .*float model"),
        (lambda g: g.update(type="random-matrix"), ModelError, "transforms input by random-matrix"),
        (lambda g: g.update(randomize=True), ModelError, "each module its own"),
        (lambda g: g["apply"].append(g["apply"][0]), ModelError, "more than once"),
        (lambda g: g["apply"][0].update(ignore=[]), ModelError, "lm_head, whose weight is in float"),
        (lambda g: g.update(head_dim=48), FileError, "down_proj has 128 channels, not blocks of 48"),
        (lambda g: g.update(head_dim=-1), FileError, "head_dim -1"),
        (lambda g: g.update(head_dim=8), FileError, "v_input.weight"),
        (lambda g: g.update(apply=7), FileError, "ct: transform_config, group v has apply 7; a list of location"),
        (lambda g: g.pop("apply"), FileError, "ct: transform_config, group v has apply None; a list of location"),
        (lambda g: g.update(apply=["input"]), FileError, "group v has apply .'input'.; a list of location"),
        (lambda g: g["apply"][0].pop("location"), FileError, "group v applies to location None; a word"),
        (lambda g: g["apply"][0].pop("targets"), FileError, "group v has targets None; a list of modules"),
        (lambda g: g.pop("type"), FileError, "group v has type None; one of hadamard, random-hadamard"),
        (lambda g: g["apply"][0].update(location="sideways"), ModelError, "transforms sideways by random-hadamard"),
    ]
    for change, error, said in cases:
        raw = json.loads(original)
        change(raw["quantization_config"]["transform_config"]["config_groups"]["v"])
        path.write_text(json.dumps(raw))
        with pytest.raises(error, match=said):
            open_source(str(folder))
    for stated in (7, {"config_groups": [1]}):
        raw = json.loads(original)
        raw["quantization_config"]["transform_config"] = stated
        path.write_text(json.dumps(raw))
        with pytest.raises(FileError, match=r"transform_config is .*; a mapping with config_groups is needed"):
            open_source(str(folder))
    path.write_text(original)
    save_file(tensors | {key: tensors[key] * 2}, folder / "model.safetensors")
    with pytest.raises(FileError, match="not orthogonal"):
        nybble.load(folder)
