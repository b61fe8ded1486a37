"""MLX: matrices that mlx packed and dequantized (``mlx_golden.py``), folders as mlx-lm lays them out, and its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file
from tests.parts.export.mlx_golden import FILE
from tests.parts.models.layouts.peers import llama, write
from tests.tiny import logits, save_tiny, tiny_model
from torch import Tensor, nn

import nybble
from nybble.core.errors import FileError, ModelError
from nybble.models.sources.layouts.mlx import Packing, made
from nybble.models.sources.open import open_source
from nybble.nn.packed import Packed

GOLDEN = load(FILE.read_bytes())
NAMES = sorted({name.rpartition(".")[0] for name in GOLDEN})
SIXTEEN = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
MIXED = {"model.layers.0.mlp.up_proj": "affine-3-32", "model.layers.1.self_attn.k_proj": "mxfp8-8-32"}
CONVERT = """
import sys
from mlx_lm.convert import convert
convert(sys.argv[1], sys.argv[2], quantize=True, q_group_size=32, q_bits=int(sys.argv[3]))
"""


def golden(name: str) -> tuple[dict[str, Tensor], Packing]:
    """A matrix that mlx packed: tensors by role, of experts the first's; and how."""
    mode, bits, group = name.split("-")[:3]
    found = {role: GOLDEN[f"{name}.{role}"] for role in ("weight", "scales", "biases") if f"{name}.{role}" in GOLDEN}
    if mode == "experts":
        found = {role: tensor[0] for role, tensor in found.items()}
        return found | {"global_scale": GOLDEN[f"{name}.global_scale"][0]}, Packing("nvfp4", 4, 16)
    return found, Packing(mode, int(bits), int(group))


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_mlx(name: str) -> None:
    tensors, how = golden(name)
    wanted = GOLDEN[f"{name}.values"]
    rows, columns = wanted.shape
    assert torch.equal(made(tensors, how, (rows, columns)).dequantize(), wanted)


def packed(kind: str, *front: int, g: torch.Generator, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Tensor]:
    """Random tensors of a module [*front, out, in], and their values by numpy's bits."""
    mode, bits, group = kind.split("-")[0], *map(int, kind.split("-")[1:])
    *front_, columns = front
    words = torch.randint(-(1 << 31), 1 << 31, (*front_, columns * bits // 32), generator=g).to(torch.int32)
    weight = words.view(torch.uint32)
    unpacked = np.unpackbits(words.numpy().view(np.uint8).reshape(-1), bitorder="little").reshape(-1, bits)
    codes = torch.from_numpy(unpacked @ (1 << np.arange(bits))).view(*front_, columns // group, group)
    if mode == "affine":
        scales = (torch.rand(*front_, columns // group, generator=g) * 0.05 - 0.02).to(dtype)
        biases = (torch.rand(*front_, columns // group, generator=g) - 0.5).to(dtype)
        values = scales.float()[..., None] * codes.float() + biases.float()[..., None]
        return {"weight": weight, "scales": scales, "biases": biases}, values.flatten(-2)
    e4m3 = mode == "nvfp4"
    scales = torch.randint(*((20, 70) if e4m3 else (118, 124)), (*front_, columns // group), generator=g).byte()
    if bits == 8:
        codes[codes & 127 == 127] = 0
        weight = codes.byte().flatten(-2).view(torch.uint32)
    by = scales.view(torch.float8_e4m3fn).float() if e4m3 else torch.exp2(scales.float() - 127)
    each = SIXTEEN[codes] if bits == 4 else codes.byte().view(torch.float8_e4m3fn).float()
    return {"weight": weight, "scales": scales}, (each * by[..., None]).flatten(-2)


def checkpoint(folder: Path, kind: str, **said: Any) -> tuple[Path, dict[str, Tensor]]:
    """A folder as mlx-lm writes it, its tied table packed too; the values of what is packed.

    Args:
        folder: to write. kind: mode, bits and group of most modules; MIXED has the others if it is ``mixed``.
        said: keys of ``quantization`` to change; None leaves one out.
    """
    model, g = llama(torch.float32, tie_word_embeddings=True), torch.Generator().manual_seed(0)
    others = MIXED if kind == "mixed" else {}
    kind = "affine-4-32" if kind == "mixed" else kind
    tensors, values = dict[str, Tensor](), dict[str, Tensor]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and name != "lm_head":
            parts, values[f"{name}.weight"] = packed(others.get(name, kind), *module.weight.shape, g=g)
            tensors |= {f"{name}.{role}": tensor for role, tensor in parts.items()}
    kept = {n: t for n, t in model.state_dict().items() if n not in values and n != "lm_head.weight"}
    write(folder, model, kept | tensors, None)
    quantization = {**as_said(kind), **{name: as_said(other) for name, other in others.items()}, **said}
    change(folder, quantization={k: v for k, v in quantization.items() if v is not None})
    return folder, values


def as_said(kind: str) -> dict[str, Any]:
    """``affine-4-64`` as config.json has it."""
    mode, bits, group = kind.split("-")
    return {"group_size": int(group), "bits": int(bits), "mode": mode}


def change(folder: Path, **keys: Any) -> None:
    """Change config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize("kind", ["affine-5-32", "mxfp4-4-32", "nvfp4-4-16", "mixed"])
def test_a_model_keeps_all_packed(kind: str, tmp_path: Path) -> None:
    """The table too, with the head that reads it; the float model with the same values says the same."""
    folder, wanted = checkpoint(tmp_path / "q", kind)
    source: Any = open_source(str(folder))
    found = source.load(list(wanted))
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    model: Any = nybble.load(folder, dtype="float32")[0]
    assert sum(isinstance(module, Packed) for module in model.modules()) == len(wanted) == 15
    assert not hasattr(model.config, "quantization")
    plain = llama(torch.float32, tie_word_embeddings=True)
    for name, value in wanted.items():
        plain.get_parameter(name).data.copy_(value)
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("affine-4-32", {"mode": None}),  # as before there were modes
        ("mixed", dict.fromkeys(MIXED)),  # what the shapes say, mlx-lm reads
        ("mxfp8-8-32", {"mode": "affine", "bits": 4, "group_size": 64}),
        ("affine-8-32", {"quant_method": None, "model.layers.0.self_attn": False, "lm_head": False}),
    ],
)
def test_what_config_leaves_open(kind: str, said: dict[str, Any], tmp_path: Path) -> None:
    folder, wanted = checkpoint(tmp_path / "q", kind, **said)
    found = open_source(str(folder)).load(list(wanted))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_activations_that_are_left_are_said(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "q", "nvfp4-4-16")
    assert open_source(str(folder)).note == ""
    change(folder, quantize_activations=True)
    assert "quantized activations" in open_source(str(folder)).note


def test_experts(tmp_path: Path) -> None:
    """Three stacks become the two fused parameters; a global scale is each expert's own."""
    model, g = tiny_model("qwen3_moe", torch.float32, hidden_size=64, moe_intermediate_size=32), torch.Generator()
    tensors, wanted = dict[str, Tensor](), dict[str, Tensor]()
    for layer in range(2):
        place, values = f"model.layers.{layer}.mlp", {}
        for leaf, shape in {"gate": (32, 64), "up": (32, 64), "down": (64, 32)}.items():
            kind = "nvfp4-4-16" if layer else "affine-6-32"
            parts, values[leaf] = packed(kind, 4, *shape, g=g)
            if layer:
                parts["global_scale"] = torch.rand(4, generator=g) + 0.5
                values[leaf] = _over(parts, values[leaf])
            tensors |= {f"{place}.switch_mlp.{leaf}_proj.{role}": tensor for role, tensor in parts.items()}
        wanted[f"{place}.experts.gate_up_proj"] = torch.cat([values["gate"], values["up"]], 1)
        wanted[f"{place}.experts.down_proj"] = values["down"]
    kept = {n: t for n, t in model.state_dict().items() if n not in wanted}
    folder = write(tmp_path / "q", model, kept | tensors, None)
    change(folder, quantization=as_said("affine-6-32"))
    found: Any = nybble.load(folder, dtype="float32")[0]
    for name, value in wanted.items():
        model.get_parameter(name).data.copy_(value)
    assert sum(isinstance(module, Packed) for module in found.modules()) == 2 * 4 * 2
    assert torch.equal(logits(found), logits(model))
    tensors["model.layers.0.mlp.switch_mlp.up_proj.biases"] = torch.zeros(4, 32, 1)
    save_file(kept | tensors, folder / "model.safetensors")
    with pytest.raises(FileError, match=r"up_proj\.biases"):
        open_source(str(folder))
    lost = {n: t for n, t in tensors.items() if "layers.0.mlp.switch_mlp.up_proj" not in n}
    save_file(kept | lost, folder / "model.safetensors")
    with pytest.raises(FileError, match=r"lacks .*up_proj\.weight"):
        open_source(str(folder))


def _over(parts: dict[str, Tensor], values: Tensor) -> Tensor:
    """Values under a global scale, multiplied in the order of mlx."""
    scales = parts["scales"].view(torch.float8_e4m3fn).float()
    outer = (parts["global_scale"] / 2688)[:, None, None]
    codes = values.view(*scales.shape, 16) / scales[..., None]
    return (codes * (scales * outer)[..., None]).flatten(-2)


def test_bad_ones_are_refused(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "q", "affine-4-32")
    tensors = load_file(folder / "model.safetensors")
    up = "model.layers.0.mlp.up_proj"
    halves: dict[str, Tensor | None] = {f"{up}.scales": torch.ones(96, 1), f"{up}.biases": torch.ones(96, 1)}
    cases: list[tuple[dict[str, Tensor | None], dict[str, Any], type[Exception], str]] = [
        ({f"{up}.biases": None}, {}, FileError, r"lacks .*up_proj\.biases"),
        ({f"{up}.scales": None}, {}, FileError, "no scales are beside it"),
        ({f"{up}.weight": None}, {}, FileError, r"lacks .*up_proj\.weight"),
        ({f"{up}.biases": torch.ones(96, 2)}, {}, FileError, "it should be BF16"),
        (halves, {}, FileError, "has 256 bits a scale"),
        (halves, {up: as_said("affine-4-32")}, FileError, "8 words a row; 1 groups of 32"),
        ({f"{up}.global_scale": torch.ones(1)}, {}, FileError, "experts in nvfp4 alone"),
        ({f"{up}.weight": tensors[f"{up}.weight"].view(torch.int32)}, {}, FileError, "it should be U32"),
        ({f"{up}.weight": torch.stack([tensors[f"{up}.weight"]] * 2)}, {}, FileError, "are no matrix"),
        ({}, {up: False}, FileError, "is in float, and it has scales"),
        ({}, {up: {"bits": 7}}, FileError, "bits 7, group_size 64"),
        ({}, {"group_size": 48}, FileError, "group_size 48"),
        ({}, {"mode": "nvfp4", "bits": 4}, FileError, "nvfp4"),
        ({}, {"mode": "zfp"}, FileError, "'zfp'"),
        ({}, {up: as_said("mxfp4-4-32")}, FileError, "it should be U8"),
    ]
    config = json.loads((folder / "config.json").read_text())["quantization"]
    for changes, said, error, text in cases:
        save_file({n: t for n, t in {**tensors, **changes}.items() if t is not None}, folder / "model.safetensors")
        change(folder, quantization=config | said)
        with pytest.raises(error, match=text):
            open_source(str(folder))
    change(folder, quantization=config, quantization_config={"quant_method": "hqq"})
    with pytest.raises(ModelError, match="hqq"):
        open_source(str(folder)).load(["lm_head.weight"])


@pytest.mark.parametrize("bits", [3])
def test_what_mlx_lm_converts(bits: int, tmp_path: Path) -> None:
    """Its folder is read to its own last bit, and written again byte for byte."""
    mx: Any = pytest.importorskip("mlx.core", reason="the oracle of MLX folders: pip install mlx mlx-cpu mlx-lm")
    from nybble.pipelines.export import export

    float_folder = save_tiny(tmp_path / "f", "llama", hidden_size=64, intermediate_size=96)
    command = [sys.executable, "-c", CONVERT, str(float_folder), str(tmp_path / "q"), str(bits)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    stored: Any = mx.load(str(tmp_path / "q" / "model.safetensors"))
    source: Any = open_source(str(tmp_path / "q"))
    names = source.packed_names()
    assert len(names) == 15
    for name in names:
        weight, scales, biases = (stored[f"{name.removesuffix('.weight')}.{r}"] for r in ("weight", "scales", "biases"))
        theirs = mx.dequantize(weight, scales.astype(mx.float32), biases.astype(mx.float32), 32, bits)
        assert np.array_equal(np.array(theirs), source.load([name])[name].numpy())
    export(tmp_path / "q", tmp_path / "back", "mlx")
    before, after = load_file(tmp_path / "q/model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[n].dtype == t.dtype and torch.equal(_raw(before[n]), _raw(t)) for n, t in after.items())


def _raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
