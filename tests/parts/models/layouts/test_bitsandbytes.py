"""Against bitsandbytes: transformers writes the folder with it, its own functions say what the values are."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.parts.models.layouts.peers import llama
from tests.tiny import logits, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import nybble
from nybble.core.errors import FileError, ModelError
from nybble.models.sources.open import open_source
from nybble.nn.packed import Packed

CASES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4 nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "fp4 in bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
}

WIDE = {"intermediate_size": 128}
"""Whole blocks in a row: the library's kernel for CPUs misreads others (0.50.2), and its generic code does not."""


@torch.no_grad()
def checkpoint(place: Path, options: dict[str, Any]) -> tuple[Path, dict[str, Tensor]]:
    """A folder, and the float32 values of its weights."""
    llama(torch.float32, **WIDE).save_pretrained(place / "float")
    auto: Any = AutoModelForCausalLM
    settings: Any = BitsAndBytesConfig
    layers: Any = bnb.nn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_pretrained(
            place / "float", quantization_config=settings(**options), dtype=torch.float32, device_map="cpu"
        )
        model.save_pretrained(place / "bnb")
    tiny_tokenizer().save_pretrained(place / "bnb")
    values: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, layers.Linear4bit):
            values[f"{name}.weight"] = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        elif isinstance(module, layers.Linear8bitLt):
            values[f"{name}.weight"] = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    assert len(values) == 14
    return place / "bnb", values


@pytest.mark.parametrize("name", CASES)
def test_values_are_the_librarys_own(name: str, tmp_path: Path) -> None:
    folder, wanted = checkpoint(tmp_path, CASES[name])
    found = open_source(str(folder)).load(list(wanted))
    for key, value in wanted.items():
        assert value.dtype == torch.float32 and value.abs().sum() > 0
        assert torch.equal(found[key], value), key


@pytest.mark.filterwarnings("ignore:.*LLM.int8 rounds activations too")
@pytest.mark.parametrize("name", ["nf4 nested", "int8"])
def test_a_model_keeps_them_packed(name: str, tmp_path: Path) -> None:
    folder, wanted = checkpoint(tmp_path, CASES[name])
    model, _ = nybble.load(folder, dtype="float32")
    plain = llama(torch.float32, **WIDE)
    for key, value in wanted.items():
        packed = model.get_submodule(key.removesuffix(".weight")).weight
        assert isinstance(packed, Packed) and packed.spec["kind"] == ("outer-scaled" if name == "int8" else "block")
        plain.get_parameter(key).data.copy_(value)
    assert torch.equal(logits(model), logits(plain))


def test_blocks_that_cross_rows() -> None:
    """Rows of 96 in blocks of 64, by the library's generic code; its kernel for CPUs is twice as far from x."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    from nybble.core.tensorheader import TensorEntry
    from nybble.models.sources.layouts import Files
    from nybble.models.sources.layouts.bitsandbytes import PART

    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    codes, state = bnb.functional.quantize_4bit(x, quant_type="nf4")
    tensors = {"l.weight": codes, **{f"l.weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    names = {torch.uint8: "U8", torch.float32: "F32"}
    entries = {
        n: TensorEntry(dtype=names[t.dtype], shape=tuple(t.shape), begin=0, nbytes=t.nbytes) for n, t in tensors.items()
    }
    (weight,) = PART.weights({}, Files("a test", entries, tensors.__getitem__))
    wanted = _dequantize_4bit_compute(codes.reshape(-1), state.absmax, state.code, 64, (64, 96), torch.float32)
    assert torch.equal(weight.values(tensors.__getitem__), wanted)
    assert (wanted - x).norm() < 0.1 * x.norm()


def test_a_table_of_its_own_is_kept(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path, CASES["nf4"])
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    before = open_source(str(folder)).load([key])[key]
    tensors[f"{key}.quant_map"] = tensors[f"{key}.quant_map"] * 2
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(open_source(str(folder)).load([key])[key], 2 * before)


def test_bad_ones_are_refused(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path, CASES["nf4 nested"])
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    state = f"{key}.quant_state.bitsandbytes__nf4"
    text = bytes(tensors[state].tolist()).decode()
    cases: list[tuple[dict[str, Tensor | None], type[Exception], str]] = [
        ({f"{key}.absmax": None}, FileError, "absmax"),
        ({key: tensors[key][:-1].clone()}, FileError, "four bits"),
        ({state: None}, FileError, "quant_state"),
        ({state: _bytes(text.replace("[128, 64]", "[128, 1e9]"))}, FileError, "whole number"),
        ({state: _bytes(text.replace("[128, 64]", "[128, 64, 1]"))}, ModelError, "matrices"),
        ({state: _bytes(text[:-5])}, FileError, "JSON"),
        ({f"{key}.nested_absmax": tensors[f"{key}.nested_absmax"].repeat(2)}, FileError, "nested_absmax"),
    ]
    for change, error, said in cases:
        save_file({n: t for n, t in {**tensors, **change}.items() if t is not None}, folder / "model.safetensors")
        with pytest.raises(error, match=said):
            open_source(str(folder))


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
