"""VQ4DiT on a diffusion transformer of diffusers, calibrated along the float model's own way: no data is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.diffusion import save_pipeline
from tests.methods.test_vq4dit import recipe

import nybble
from nybble.qtensor.vector import VectorQTensor

SETTINGS: dict[str, Any] = {"samples": 16, "batch": 4, "dtype": "float32"}
BLOCK = {
    *(f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")), "ff.net.0.proj", "ff.net.2", "norm1.linear",
}  # fmt: skip


def test_every_linear_of_the_blocks_whatever_the_student(tmp_path: Path) -> None:
    """Inputs bit for bit alike under all students; attention, MLP and modulation in code books, all else in float."""
    torch.set_num_threads(1)
    folder, errors, inputs = save_pipeline(tmp_path / "dit", "dit"), {}, set()
    book = {"entries": 32}
    asked_of = {"plain": recipe(0, book), "book": recipe(60, book, candidates=1), "joint": recipe(60, book)}
    for name, asked in asked_of.items():
        model, report = nybble.quantize(folder, asked, settings=SETTINGS)
        if name == "plain":  # without a learned part, nothing is run at all
            assert report.manifest["data"] is None
        else:
            inputs.add(report.manifest["data"]["inputs_sha256"])
        found = [w for row in report.layers for w in (row.learned or {}).get("windows", ()) if "curve" in w]
        errors[name] = [(window["before"], window["after"]) for window in found]
        names = {row.name.removeprefix("net.") for row in report.layers}
        assert names == {f"transformer_blocks.{block}.{layer}" for block in (0, 1) for layer in BLOCK}
        for row in report.layers:
            tensor = model.get_submodule(row.name).weight.qtensor()
            assert isinstance(tensor, VectorQTensor) and int(tensor.index().max()) < len(tensor.codebook) <= 32
    assert len(inputs) == 1 and not errors["plain"]
    assert all(after < before for name in ("book", "joint") for before, after in errors[name])


def test_no_diffusion_model_without_its_scheduler(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "dit", "dit")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(nybble.core.errors.NybbleError, match="scheduler"):
        nybble.quantize(folder, recipe(), settings=SETTINGS, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
