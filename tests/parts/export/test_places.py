"""What a target has no place for is refused before anything is quantized, and before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.fuzz.folders import folders
from tests.parts.export.folders import model
from tests.parts.export.test_convert import gguf, wide
from tests.parts.models.layouts import test_awq, test_mxfp4

import nybble
from nybble.core.errors import ModelError, SchemeError, UsageError
from nybble.pipelines.convert import convert
from nybble.pipelines.export import export
from nybble.pipelines.quantize import quantize

TARGETS = ("compressed-tensors", "mlx", "modelopt", "modelopt-nvfp4")
ONE_TENSOR = "experts that this family keeps in one tensor.*--ignore Experts"


@pytest.mark.parametrize("target", TARGETS)
def test_experts_in_one_tensor_are_not_written_over_each_other(target: str, tmp_path: Path) -> None:
    folder, _, _ = test_mxfp4.checkpoint(tmp_path / "q")
    with pytest.raises(ModelError, match=f"(?s)mlp.experts.gate_up_proj.*{ONE_TENSOR}"):
        convert(folder, tmp_path / "d", target)
    with pytest.raises(UsageError, match=f"none of the usual lines fits .*mlp.experts.gate_up_proj.*{ONE_TENSOR}"):
        convert(folder, tmp_path / "d", target, round="auto")
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_scheme_is_refused_before_it_is_quantized(target: str, tmp_path: Path) -> None:
    test_mxfp4._model().save_pretrained(tmp_path / "experts")
    for place, said in ((tmp_path / "experts", ONE_TENSOR), (model("gpt2"), "c_attn.*a Conv1D.*--ignore Conv1D")):
        with pytest.raises(SchemeError, match=said):
            quantize(str(place), "rtn", weights="nvfp4", target=target, out=tmp_path / "q")
    quantize(str(tmp_path / "experts"), "rtn", weights="nvfp4", ignore=["Experts"], target=target, out=tmp_path / "q")
    found = export(tmp_path / "q", tmp_path / "d", target)
    assert found["bytes"] and sorted(p.name for p in tmp_path.iterdir()) == ["d", "experts", "q"]


def test_a_trial_has_rows_for_every_block(tmp_path: Path) -> None:
    """``float8_e4m3fn block=128x128`` is among what ModelOpt takes of eight bits."""
    convert(wide(tmp_path / "float"), tmp_path / "g", "gguf:q8_0")
    found = convert(gguf(tmp_path / "g"), tmp_path / "d", "modelopt", round="auto", check=True)
    assert found["check"]["weights"] == 8 and len(found["rounded"]) > 1


def test_siblings_are_told_apart_once_the_others_are_held(tmp_path: Path) -> None:
    """Of two joined layers each of which would be held, refused after those that are not have been rounded."""
    file = folders()["gguf of many types"](tmp_path)
    found = convert(file, tmp_path / "d", "compressed-tensors", round="auto", check=True)
    lines = {name: row["to"] for row in found["rounded"] for name in row["layers"]}
    pair = [f"model.layers.1.mlp.{leaf}_proj" for leaf in ("gate", "up")]
    assert lines[pair[0]] == lines[pair[1]] and found["check"]["weights"] == 16


def test_types_that_gguf_cannot_decode_are_named(tmp_path: Path) -> None:
    file = folders()["gguf of many types"](tmp_path)
    found = convert(file, tmp_path / "d", "gguf", check=True)["check"]
    assert found["weights"] == 14 and "decodes no Q1_0" in found["uncalled"]


def test_scales_are_those_of_the_type(tmp_path: Path) -> None:
    """Q8_0 has float16 scales; a scale a row is in float32 where its line says nothing."""
    quantize(str(wide(tmp_path / "float")), "rtn", weights="int8 channel", target="gguf", out=tmp_path / "q")
    assert export(tmp_path / "q", tmp_path / "d", "gguf", check=True)["check"]["weights"] == 7


@torch.no_grad()
def test_mlx_runs_what_others_wrote(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm", reason="the oracle of MLX folders: pip install mlx mlx-cpu mlx-lm")
    folder, wanted = test_awq.checkpoint(tmp_path / "q", 32)
    found = convert(folder, tmp_path / "d", "mlx", check=True)["check"]
    assert found["weights"] == len(wanted) and not found["uncalled"] and found["largest"] < 1e-5
    assert nybble.load(tmp_path / "d")
