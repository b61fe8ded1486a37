"""AWQ in whole models: a packer and a decoder written out for this test; test_words.py has the libraries' own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.parts.models.layouts.peers import linears, llama, swapped, write
from tests.tiny import logits
from torch import Tensor

import nybble
from nybble.core.errors import FileError, ModelError
from nybble.models.sources.open import open_source
from nybble.nn.packed import Packed


def interleaved(codes: Tensor) -> Tensor:
    """[n, out] -> int32 [n, out / 8]: output ``8 w + ORDER[i]`` is in bits ``4 i ...`` of word w."""
    out = []
    for row in codes.tolist():
        found = []
        for w in range(0, len(row), 8):
            word = sum(row[w + place] << (4 * i) for i, place in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
            found.append(word - (1 << 32) if word >= 1 << 31 else word)
        out.append(found)
    return torch.tensor(out, dtype=torch.int32)


def checkpoint(folder: Path, size: int) -> tuple[Path, dict[str, Tensor]]:
    model, g = llama(torch.float16), torch.Generator().manual_seed(0)
    made, values = {}, {}
    for name, module in linears(model).items():
        rows, columns = module.out_features, module.in_features
        step = columns if size < 0 else size
        codes = torch.randint(0, 16, (columns, rows), generator=g)
        zeros = torch.randint(0, 16, (columns // step, rows), generator=g)
        scales = (torch.rand(columns // step, rows, generator=g) * 0.1 + 0.01).half()
        index = torch.arange(columns) // step
        values[f"{name}.weight"] = (scales[index] * (codes - zeros[index]).half()).T.contiguous()
        made[name] = {"qweight": interleaved(codes), "qzeros": interleaved(zeros), "scales": scales}
    said = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
    return write(folder, model, swapped(model, made), said), values


@pytest.mark.parametrize("size", [32, -1])
def test_values_are_those_of_the_formula(size: int, tmp_path: Path) -> None:
    folder, wanted = checkpoint(tmp_path / "q", size)
    found = open_source(str(folder)).load(list(wanted))
    for key, value in wanted.items():
        assert torch.equal(found[key].half(), value), key


def test_a_model_keeps_them_packed(tmp_path: Path) -> None:
    folder, wanted = checkpoint(tmp_path / "q", 32)
    model, _ = nybble.load(folder, dtype="float16")
    plain = llama(torch.float16)
    for key, value in wanted.items():
        assert isinstance(model.get_submodule(key.removesuffix(".weight")).weight, Packed)
        plain.get_parameter(key).data.copy_(value)
    assert torch.equal(logits(model), logits(plain))


def test_bad_ones_are_refused(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "q", 32)
    raw = json.loads((folder / "config.json").read_text())
    for change, error, text in (
        ({"version": "gemv"}, ModelError, "gemv"),
        ({"bits": 3}, ModelError, "3 bits"),
        ({"group_size": 40}, FileError, "don't divide"),
        ({"group_size": 16}, FileError, "scales"),
    ):
        said = {**raw["quantization_config"], **change}
        (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": said}))
        with pytest.raises(error, match=text):
            open_source(str(folder))
