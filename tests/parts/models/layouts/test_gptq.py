"""GPTQ in whole models: a packer and a decoder written out for this test; test_words.py has the libraries' own.

They shift Python integers into words one code at a time, and know nothing of streams or QTensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parts.models.layouts.peers import linears, llama, swapped, write
from tests.tiny import logits
from torch import Tensor

import nybble
from nybble.core.errors import FileError, ModelError
from nybble.models.sources.open import open_source
from nybble.nn.packed import Packed


def down(codes: Tensor, bits: int) -> Tensor:
    """[n, m] -> int32 [words, m]: code i of a column is in bits ``i * bits ...`` of that column's words."""
    n, m = codes.shape
    columns = []
    for j in range(m):
        number = sum(int(c) << (i * bits) for i, c in enumerate(codes[:, j].tolist()))
        count = -(-n * bits // 32)
        column = [(number >> (32 * w)) & 0xFFFFFFFF for w in range(count)]
        columns.append([w - (1 << 32) if w >= 1 << 31 else w for w in column])
    return torch.tensor(columns, dtype=torch.int32).T.contiguous()


def layer(
    rows: int, columns: int, bits: int, size: int, order: bool, less: int, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a layer, and its float16 weight by the formula scales[g] * (code - zero point)."""
    g = torch.Generator().manual_seed(seed)
    size = columns if size < 0 else size
    groups = -(-columns // size)
    codes = torch.randint(0, 1 << bits, (columns, rows), generator=g)
    zeros = torch.randint(0, 1 << bits, (groups, rows), generator=g)
    scales = (torch.rand(groups, rows, generator=g) * 0.1 + 0.01).half()
    index = torch.arange(columns) // size
    if order:
        index = index[torch.randperm(columns, generator=g)]
    weight = (scales[index] * (codes - zeros[index]).half()).T
    # GPTQModel takes one from each point of a whole word at once, so that a 0 borrows from its neighbour; from points
    # that go across words one by one
    whole = 32 % bits == 0
    points = down((zeros if whole else (zeros - less) % (1 << bits)).T, bits).T.contiguous()
    ones = sum(less << place for place in range(0, 32, bits))
    parts = {
        "qweight": down(codes, bits),
        "qzeros": (points.long() - ones).to(torch.int32) if whole else points,
        "scales": scales,
        "g_idx": index.int(),
    }
    return parts, weight.contiguous()


def checkpoint(
    folder: Path, bits: int, size: int, *, order: bool = False, form: str | None = None, dtype: Any = torch.float16
) -> tuple[Path, dict[str, Tensor]]:
    model = llama(dtype)
    made, values = {}, {}
    for i, (name, module) in enumerate(linears(model).items()):
        shape = module.out_features, module.in_features
        made[name], values[f"{name}.weight"] = layer(*shape, bits, size, order, int(form != "gptq_v2"), i)
    said = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": False, "desc_act": order}
    if form is not None:
        said["checkpoint_format"] = form
    return write(folder, model, swapped(model, made), said), values


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", [None, "gptq", "gptq_v2"])
def test_values_are_those_of_the_formula(bits: int, form: str | None, tmp_path: Path) -> None:
    folder, wanted = checkpoint(tmp_path / "q", bits, 32, form=form, order=form == "gptq_v2")
    found = open_source(str(folder)).load(list(wanted))
    for key, value in wanted.items():
        assert torch.equal(found[key].half(), value), key


def test_rows_and_short_groups(tmp_path: Path) -> None:
    for i, size in enumerate((-1, 40)):
        folder, wanted = checkpoint(tmp_path / str(i), 4, size)
        found = open_source(str(folder)).load(list(wanted))
        assert all(torch.equal(found[key].half(), value) for key, value in wanted.items())


def test_a_model_keeps_them_packed(tmp_path: Path) -> None:
    folder, wanted = checkpoint(tmp_path / "q", 4, 32, order=True)
    model, _ = nybble.load(folder, dtype="float16")
    plain = llama(torch.float16)
    for key, value in wanted.items():
        packed = model.get_submodule(key.removesuffix(".weight")).weight
        assert isinstance(packed, Packed) and packed.spec["kind"] == "split"
        plain.get_parameter(key).data.copy_(value)
    assert torch.equal(logits(model), logits(plain))


def test_bad_ones_are_refused(tmp_path: Path) -> None:
    import json

    from safetensors.torch import load_file, save_file

    folder, _ = checkpoint(tmp_path / "q", 4, 32)
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.0.mlp.up_proj."
    for leaf in ("scales", "qzeros"):
        save_file({n: t for n, t in tensors.items() if n != key + leaf}, folder / "model.safetensors")
        with pytest.raises(FileError, match=leaf):
            open_source(str(folder))
    uneven = tensors[f"{key}g_idx"].clone()
    uneven[0] = 1
    save_file({**tensors, f"{key}g_idx": uneven}, folder / "model.safetensors")
    with pytest.raises(FileError, match="g_idx"):
        open_source(str(folder)).load([f"{key}weight"])
    save_file(tensors, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    for change, error, text in (
        ({"bits": 3}, FileError, "words"),
        ({"bits": "4"}, FileError, "whole number"),
        ({"checkpoint_format": "marlin"}, ModelError, "marlin"),
        ({"group_size": 16}, FileError, "scales"),
    ):
        (folder / "config.json").write_text(
            json.dumps({**raw, "quantization_config": {**raw["quantization_config"], **change}})
        )
        with pytest.raises(error, match=text):
            open_source(str(folder))
