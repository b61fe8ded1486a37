"""Against compressed-tensors: its compressors write, its decompressors say what the values are."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle import apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from tests.parts.models.layouts.peers import linears, llama, write
from tests.tiny import logits
from torch import Tensor

import nybble
from nybble.core.errors import FileError, ModelError
from nybble.models.sources.layouts._pieces import stream_rows
from nybble.models.sources.open import open_source
from nybble.nn.linear import QuantLinear
from nybble.nn.packed import Packed

INT: dict[str, Any] = {"type": "int", "symmetric": True}
GROUP = {"strategy": "group", "group_size": 32}
FLOAT: dict[str, Any] = {"type": "float", "symmetric": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"pack int{b}": ("pack-quantized", {**INT, **GROUP, "num_bits": b}) for b in range(2, 9)},
    **{
        f"pack int{b} zeros": ("pack-quantized", {**INT, **GROUP, "num_bits": b, "symmetric": False})
        for b in range(2, 9)
    },
    "pack channel zeros": ("pack-quantized", {**INT, "strategy": "channel", "num_bits": 3, "symmetric": False}),
    "pack tensor zeros": ("pack-quantized", {**INT, "strategy": "tensor", "num_bits": 4, "symmetric": False}),
    "pack block": ("pack-quantized", {**INT, "strategy": "block", "block_structure": [16, 32], "num_bits": 4}),
    "int8 channel": ("int-quantized", {**INT, "strategy": "channel", "num_bits": 8}),
    "int8 zeros": ("int-quantized", {**INT, "strategy": "channel", "num_bits": 8, "symmetric": False}),
    "naive int4": ("naive-quantized", {**INT, **GROUP, "num_bits": 4}),
    "fp8 channel": ("float-quantized", {**FLOAT, "strategy": "channel", "num_bits": 8}),
    "fp8 tensor": ("float-quantized", {**FLOAT, "strategy": "tensor", "num_bits": 8}),
    "fp8 block": ("float-quantized", {**FLOAT, "strategy": "block", "block_structure": [16, 32], "num_bits": 8}),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {**FLOAT, "strategy": "tensor_group", "group_size": 16, "num_bits": 4, "scale_dtype": torch.float8_e4m3fn},
    ),
    "nvfp4 of 32": (
        "nvfp4-pack-quantized",
        {**FLOAT, "strategy": "tensor_group", "group_size": 32, "num_bits": 4, "scale_dtype": torch.float8_e4m3fn},
    ),
    "mxfp4": ("mxfp4-pack-quantized", {**FLOAT, **GROUP, "num_bits": 4, "scale_dtype": torch.uint8}),
    "mxfp6": ("mxfp6-pack-quantized", {**FLOAT, **GROUP, "num_bits": 6, "scale_dtype": torch.uint8}),
    "mxfp8": ("mxfp8-quantized", {**FLOAT, **GROUP, "num_bits": 8, "scale_dtype": torch.uint8}),
}


def _fit(module: Any, args: QuantizationArgs, largest: Tensor) -> None:
    """Scales as the library calculates them from the least and largest values."""
    w, shared = module.weight.detach().float(), None
    if hasattr(module, "weight_global_scale"):
        shared = generate_gparam(-largest, largest)
        module.weight_global_scale.data.copy_(shared.reshape(module.weight_global_scale.shape))
    rows, columns = w.shape
    cut = w.reshape(1, 1, rows * columns)
    if args.strategy == "channel":
        cut = w.reshape(rows, 1, columns)
    elif args.group_size:
        cut = w.reshape(rows, -1, args.group_size)
    elif args.strategy == "block":
        high, wide = args.block_structure
        cut = w.reshape(rows // high, high, columns // wide, wide).transpose(1, 2).flatten(2)
    scale, zero = calculate_qparams(cut.amin(-1), cut.amax(-1), args, global_scale=shared)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))


@torch.no_grad()
def checkpoint(folder: Path, form: str, args: dict[str, Any]) -> tuple[Path, dict[str, Tensor]]:
    """A folder, and what the library decompresses its weights to."""
    model = llama()
    weights = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=form)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format=form)
    apply_quantization_config(model, config)
    largest = max(m.weight.abs().max().float() for m in linears(model).values())  # siblings share a global scale
    for module in linears(model).values():
        _fit(module, weights, largest)
    compressor = ModelCompressor(quantization_config=config, force_compression_format=form)
    compressor.compress_model(model)
    tensors = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    said = {**json.loads(config.model_dump_json()), "quant_method": "compressed-tensors"}
    write(folder, model, tensors, said)
    back = copy.deepcopy(model)
    compressor.decompress_model(back)
    return folder, {f"{n}.weight": m.weight.detach() for n, m in linears(back).items()}


@pytest.mark.parametrize("name", CASES)
def test_values_are_the_librarys_own(name: str, tmp_path: Path) -> None:
    folder, wanted = checkpoint(tmp_path / "ct", *CASES[name])
    found = open_source(str(folder)).load(list(wanted))
    for key, value in wanted.items():
        assert value.abs().sum() > 0
        assert torch.equal(found[key].to(value.dtype), value), key


@pytest.mark.parametrize("name", ["pack int3 zeros", "nvfp4", "fp8 block"])
def test_a_model_keeps_them_packed(name: str, tmp_path: Path) -> None:
    folder, wanted = checkpoint(tmp_path / "ct", *CASES[name])
    model, tokenizer = nybble.load(folder)
    assert tokenizer is not None
    plain = llama()
    for key, value in wanted.items():
        layer = model.get_submodule(key.removesuffix(".weight"))
        assert isinstance(layer, QuantLinear) and isinstance(layer.weight, Packed)
        assert torch.equal(layer.weight(torch.bfloat16), value)
        plain.get_parameter(key).data.copy_(value)
    assert torch.equal(logits(model), logits(plain))


def _changed(folder: Path, change: Any) -> Path:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    change(raw["quantization_config"])
    path.write_text(json.dumps(raw))
    return folder


def test_bad_ones_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, _ = checkpoint(tmp_path / "ct", *CASES["pack int4"])
    tensors, original = load_file(folder / "model.safetensors"), (folder / "config.json").read_text()
    key = "model.layers.0.mlp.up_proj.weight_"
    damaged: dict[str, Tensor | None] = {
        "scale": None,
        "packed": tensors[f"{key}packed"][:, :-1].clone(),
        "shape": torch.tensor([1 << 40, 64]),
    }
    for leaf, value in damaged.items():
        left = {n: t for n, t in tensors.items() if n != key + leaf}
        save_file(left if value is None else {**left, key + leaf: value}, folder / "model.safetensors")
        with pytest.raises(FileError, match="up_proj"):
            open_source(str(folder))
    save_file(tensors, folder / "model.safetensors")
    changes: list[tuple[Any, type[Exception], str]] = [
        (lambda c: c.update(transform_config={"config_groups": {"R1": {}}}), FileError, "apply"),
        (lambda c: c["config_groups"]["group_0"].update(format="marlin-24"), ModelError, "marlin-24"),
        (lambda c: c["config_groups"]["group_0"].update(targets=["re:nothing"]), FileError, "no group"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=3), FileError, "3-bit"),
        (lambda c: c.pop("config_groups"), FileError, "config_groups"),
    ]
    for change, error, text in changes:
        (folder / "config.json").write_text(original)
        with pytest.raises(error, match=text):
            open_source(str(_changed(folder, change)))


@pytest.mark.parametrize(
    ("name", "changes", "error", "text"),
    [
        ("nvfp4", {"group_size": 32}, FileError, r"says group_size 32, with which \S+ \[64, 96\] has .*wrong"),
        ("nvfp4 of 32", {"group_size": 16}, FileError, "says group_size 16, with which"),
        ("nvfp4", {"group_size": 40}, FileError, "groups of 40 don't divide"),
        ("nvfp4", {"symmetric": False}, FileError, "said to have zero points"),
        ("mxfp4", {"group_size": 16}, FileError, "says group_size 16"),
    ],
)
def test_groups_of_another_size_are_refused(
    name: str, changes: dict[str, Any], error: type[Exception], text: str, tmp_path: Path
) -> None:
    folder, _ = checkpoint(tmp_path / "ct", *CASES[name])
    _changed(folder, lambda c: c["config_groups"]["group_0"]["weights"].update(changes))
    with pytest.raises(error, match=text):
        open_source(str(folder))


def test_zero_points_of_few_rows_are_one_word() -> None:
    """[1, groups] in the files: turned around, a column whose stride is no longer 1."""
    codes = torch.arange(32, dtype=torch.int64).view(2, 16) % 4
    words = (codes << torch.arange(0, 32, 2)).sum(1).to(torch.int32).view(1, 2)  # 16 rows, 2 groups
    assert torch.equal(stream_rows(words.T.contiguous(), 2, 16), codes.to(torch.uint8))
