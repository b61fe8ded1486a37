"""The target c-train: from a folder, quantized or not, to C that gcc runs; what it can't express is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parts.export.folders import model
from tests.parts.microcontroller.test_project import compiles
from transformers import ResNetConfig, ResNetForImageClassification

from nybble.core.errors import FileError, ModelError, UsageError
from nybble.models.own.microcontroller import MicrocontrollerConfig, MicrocontrollerForImageClassification
from nybble.pipelines.export import export
from nybble.pipelines.quantize import quantize


def saved(folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    name = MicrocontrollerForImageClassification.__name__
    sizes: dict[str, Any] = {"width": 2, "image_size": [8, 8], "num_labels": 3, "architectures": [name]}
    MicrocontrollerForImageClassification(MicrocontrollerConfig(**sizes, **options)).save_pretrained(folder)
    return folder


@compiles
def test_a_float_folder_and_a_quantized_one(tmp_path: Path) -> None:
    """`--check` compiles both kinds of kernels; a quantized network's weights are what it dequantizes."""
    options = {"update": ["classifier"], "rate": 0.1, "memory": 65536}
    float_one = saved(tmp_path / "m", norm="batch", c_train=options)
    done = export(float_one, tmp_path / "c", "c-train", check=True)
    assert done["check"]["opened_with"]["gcc"] and done["check"]["exact_in"] == "float16"
    assert any("bytes of arrays" in note for note in done["notes"])
    assert {"net.c", "net.h", "Makefile", "weights.h", "reference.h", "memory.json", "README.md"} <= set(done["files"])
    held = json.loads((tmp_path / "c" / "memory.json").read_text())
    assert held["bytes"] < 65536 and [n for n, row in held["layers"].items() if row["learns"]] == ["classifier"]
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    quantize(str(float_one), "rtn", out=tmp_path / "q", data=images, weights="int4 channel")
    export(tmp_path / "q", tmp_path / "cq", "c-train:f32")
    text = (tmp_path / "cq" / "weights.h").read_text()
    row = text.partition("init_l_net_3_first_weight[36] = {")[2].partition("}")[0].replace("\n", "").split(",")
    codes = [int(word, 16) for word in row if word.strip()]
    assert len(codes) == 36 and len(set(codes[:18])) <= 16 < len(set(codes[:18])) + 15
    assert (tmp_path / "cq" / "weights.h").read_text() != (tmp_path / "c" / "weights.h").read_text()


def test_a_network_of_transformers_with_its_norms_folded(tmp_path: Path) -> None:
    done = export(model("resnet"), tmp_path / "c", "c-train")
    layers = json.loads((tmp_path / "c" / "memory.json").read_text())["layers"]
    assert not any("normalization" in name for name in layers) and "net.c" in done["files"]
    first = layers["resnet.embedder.embedder.convolution"]
    assert first["multiply_adds"][:2] == [8 * 3 * 49 * 16 * 16] * 2


def test_what_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"c-train can't hold.*LlamaForCausalLM: .*no num_channels and image_size"):
        export(model("llama"), tmp_path / "c", "c-train")
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "image_size": 32}
    ResNetForImageClassification(ResNetConfig(**sizes, hidden_act="silu")).save_pretrained(tmp_path / "silu")
    with pytest.raises(ModelError, match=r"a ResNetFor.*: resnet\.embedder\.embedder\.activation: .*no form for silu"):
        export(tmp_path / "silu", tmp_path / "c", "c-train")
    for options, words in (
        ({"memory": 100}, r"(?s)a training step needs [\d,]+ bytes .*the limit is 100\. Train fewer.*\nnet\.0 "),
        ({"update": ["head"]}, r"no layer with parameters is called 'head'.*classifier"),
        ({"lanes": 3}, r"lanes is 3"),
        ({"speed": 1}, r"c_train has no option 'speed'"),
        ({"cores": 0}, r"cores is 0"),
    ):
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        with pytest.raises(UsageError, match=words):
            export(saved(tmp_path / "m", c_train=options), tmp_path / "c", "c-train")
    with pytest.raises(FileError, match=r"is not a model that nybble wrote"):
        export(saved(tmp_path / "m"), tmp_path / "c", "dense")
    with pytest.raises(UsageError, match=r"unknown option 'fp61'"):
        export(tmp_path / "m", tmp_path / "c", "c-train:fp61")
    assert not (tmp_path / "c").exists()


def test_a_missing_compiler_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "m")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match=r"gcc isn't on the path.*Without --check nothing is compiled here"):
        export(folder, tmp_path / "c", "c-train", check=True)
    assert not (tmp_path / "c").exists()
    assert export(folder, tmp_path / "c", "c-train:bf16")["target"] == "c-train:bf16"
    assert "TYPE = 17" in (tmp_path / "c" / "config.mk").read_text()
