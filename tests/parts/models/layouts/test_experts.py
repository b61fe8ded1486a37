"""Experts that a library packed one by one, in a model that has them in one parameter: read as codes, one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import compress_module, decompress_module
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, initialize_module_for_quantization
from safetensors.torch import load_file, save_file
from tests.parts.models.layouts import test_compressed_tensors as ct
from tests.tiny import logits, tiny_model, tiny_tokenizer
from torch import Tensor, nn

import nybble
from nybble.checkpoint.account import inspect
from nybble.export._opened import OpenedSource
from nybble.models.sources.open import open_source
from nybble.nn.experts import PackedExperts
from nybble.pipelines.export import export, opened

FAMILIES = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}


@torch.no_grad()
def checkpoint(
    folder: Path, form: str, args: dict[str, Any], family: str = "mixtral", *, apart: bool = False
) -> tuple[Path, dict[str, Tensor], Any]:
    """A folder in the names of the family's float checkpoints, each expert's matrices packed by compressed-tensors.

    Args:
        folder: where. form, args: of the library. family: of the model.
        apart: whether gate and up have global scales of their own.

    Returns:
        the folder, the values that the library decompresses, by the model's names, and the float model that has them.
    """
    model = tiny_model(family, **SIZES)
    model.set_experts_implementation("eager")  # one expert at a time, as packed ones are run
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    weights = QuantizationArgs(**args)
    tensors: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if ".experts." not in name:
            tensors[name] = tensor
            continue
        layer = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False, dtype=tensor.dtype)
        layer.weight.data.copy_(tensor)
        initialize_module_for_quantization(layer, QuantizationScheme(targets=["Linear"], weights=weights, format=form))
        ct._fit(layer, weights, tensor.abs().max().float() if apart else torch.tensor(2.0))
        compress_module(layer)
        tensors |= {f"{module}.{leaf}": t.detach().clone() for leaf, t in layer.state_dict().items()}
        decompress_module(layer)
        values[name] = layer.weight.detach().clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    said = json.loads(weights.model_dump_json())
    group = {"targets": ["Linear"], "weights": said, "format": form}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(folder)
    joined = _joined(values, FAMILIES[family])
    for name, value in joined.items():
        model.get_parameter(name).data.copy_(value)
    return folder, joined, model


def _joined(values: dict[str, Tensor], leaves: tuple[str, str, str]) -> dict[str, Tensor]:
    """Stacked as the model has them."""
    gate, up, down = leaves
    found: dict[str, Tensor] = {}
    for name in values:
        if not name.endswith(f".experts.0.{down}.weight"):
            continue
        stem = name.removesuffix(f".0.{down}.weight")
        of = [[values[f"{stem}.{e}.{leaf}.weight"] for leaf in (gate, up, down)] for e in range(4)]
        ours = stem.replace("block_sparse_moe", "mlp")
        found[f"{ours}.gate_up_proj"] = torch.stack([torch.cat([g, u]) for g, u, _ in of])
        found[f"{ours}.down_proj"] = torch.stack([d for _, _, d in of])
    return found


CASES = ["pack int4 zeros", "pack int3", "pack channel zeros", "int8 channel", "fp8 block", "nvfp4", "mxfp4", "mxfp8"]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_model_keeps_the_codes(name: str, tmp_path: Path) -> None:
    folder, wanted, plain = checkpoint(tmp_path / "q", *ct.CASES[name])
    source: Any = open_source(str(folder))
    assert source.streamable and "memory" not in source.note and len(wanted) == 4
    found = source.load(list(wanted))
    model, _ = nybble.load(folder)
    for key, value in wanted.items():
        assert value.abs().sum() > 0 and torch.equal(found[key].to(value.dtype), value)
        owner, _, leaf = key.rpartition(".")
        experts: Any = getattr(model.get_submodule(owner), leaf)
        assert isinstance(experts, PackedExperts) and all(torch.equal(experts[e], value[e]) for e in range(4))
        parts: Any = experts.experts
        assert {part.spec["kind"] for part in parts} == {"block"}
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("name", ["nvfp4", "fp8 tensor", "pack tensor zeros"])
def test_halves_that_share_no_scale_stand_side_by_side(name: str, tmp_path: Path) -> None:
    folder, wanted, plain = checkpoint(tmp_path / "q", *ct.CASES[name], "qwen3_moe", apart=True)
    model, _ = nybble.load(folder)
    key = next(iter(wanted))
    owner, _, leaf = key.rpartition(".")
    experts: Any = getattr(model.get_submodule(owner), leaf)
    assert {part.spec["kind"] for part in experts.experts} == {"split"}
    assert torch.equal(logits(model), logits(plain))


def test_there_and_back_keeps_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, wanted, _ = checkpoint(tmp_path / "q", *ct.CASES["pack int4 zeros"])
    sizes = inspect(folder)
    assert sizes["quantized_parameters"] == 2 * 4 * 3 * 64 * 96
    was_read, read = list[str](), OpenedSource._read

    def noted(self: OpenedSource, name: str) -> Any:
        was_read.append(name)
        return read(self, name)

    monkeypatch.setattr(OpenedSource, "_read", noted)
    export(folder, tmp_path / "back", "compressed-tensors")
    assert sorted(was_read) == sorted(wanted)  # once each, though their matrices are written in turn
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    renamed = {k.replace("block_sparse_moe", "mlp"): t for k, t in before.items() if ".experts." in k}
    kept = {k.replace("block_sparse_moe", "mlp"): t for k, t in after.items() if ".experts." in k}
    assert renamed.keys() == kept.keys()
    assert all(torch.equal(kept[k].view(torch.uint8), t.view(torch.uint8)) for k, t in renamed.items())


@pytest.mark.parametrize("apart", [False, True])
def test_written_elsewhere_as_codes(apart: bool, tmp_path: Path) -> None:
    """Whether halves share a scale, their numbers say: one layer may, and the next not."""
    folder, wanted, _ = checkpoint(tmp_path / "q", *ct.CASES["nvfp4"], "qwen3_moe", apart=apart)
    if apart:
        tensors = load_file(folder / "model.safetensors")
        one = {k: torch.ones(1) for k in tensors if "layers.0." in k and k.endswith("global_scale")}
        save_file(tensors | one, folder / "model.safetensors", {"format": "pt"})
        wanted = open_source(str(folder)).load(list(wanted))
    with opened(folder, tmp_path / "dense") as source:
        layers: Any = source.layers
        kinds = {n: {w.spec()["kind"] for w in layers[n].weights.values()} for n in wanted if "gate_up" in n}
        assert sorted(map(str, kinds.values())) == (["{'block'}", "{'split'}"] if apart else ["{'block'}"] * 2)
        assert not source.notes
    export(folder, tmp_path / "dense", "dense:float32")
    found = open_source(str(tmp_path / "dense")).load(list(wanted))
    assert all(torch.equal(found[name].to(value.dtype), value) for name, value in wanted.items())


def test_one_expert_in_float_makes_its_parameter_float(tmp_path: Path) -> None:
    folder, wanted, plain = checkpoint(tmp_path / "q", *ct.CASES["pack int4"])
    tensors = load_file(folder / "model.safetensors")
    one = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    value = wanted["model.layers.0.mlp.experts.gate_up_proj"][2, :96]
    left = {k: t for k, t in tensors.items() if not k.startswith(one)} | {one: value.clone()}
    save_file(left, folder / "model.safetensors")
    model, _ = nybble.load(folder)
    layers: Any = model.model.layers
    assert isinstance(layers[0].mlp.experts.gate_up_proj, nn.Parameter)
    assert isinstance(layers[1].mlp.experts.gate_up_proj, PackedExperts)
    assert torch.equal(logits(model), logits(plain))


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    folder, _, _ = checkpoint(tmp_path / "q", *ct.CASES["pack int4"])
    tensors = load_file(folder / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if ".experts.3.w2" not in k}, folder / "model.safetensors")
    with pytest.raises(nybble.NybbleError):
        nybble.load(folder)


def test_rounded_inputs_that_experts_do_not_get_are_told(tmp_path: Path) -> None:
    folder, _, _ = checkpoint(tmp_path / "q", *ct.CASES["fp8 block"])
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    assert "fused experts" not in open_source(str(folder)).note
    (group,) = raw["quantization_config"]["config_groups"].values()
    group["input_activations"] = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    path.write_text(json.dumps(raw))
    assert "rounded inputs of fused experts, too; here those stay in float" in open_source(str(folder)).note
