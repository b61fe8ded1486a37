"""Online rotations in compressed-tensors' files: its schema takes them, and its transforms give nybble's logits."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.parts.export.folders import model, text
from tests.tiny import logits

import nybble
from nybble.core.errors import ModelError, SchemeError
from nybble.export import _transformers as opening
from nybble.pipelines.convert import convert
from nybble.pipelines.export import export
from nybble.recipe import parse_recipe

with warnings.catch_warnings():  # what it warns of at import is none of ours
    warnings.simplefilter("ignore")
    pytest.importorskip("compressed_tensors", reason="the oracle of vLLM's checkpoints: pip install compressed-tensors")
    from compressed_tensors.transform import TransformConfig

TARGET = "compressed-tensors"
CASES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "int4, whole": ({"weights": "int4 group=32"}, {}),
    "int4, signs": ({"weights": "int4 group=32"}, {"layers": "all", "block": 32, "signs": True}),
    "mxfp4": ({"weights": "mxfp4", "inputs": "mxfp4"}, {"layers": "all", "block": 32}),
}


@cache
def rotated(name: str) -> Path:
    scheme, options = CASES[name]
    steps: list[dict[str, Any]] = [{"transform": "online-rotation", **options}, {"solver": "rtn"}]
    asked = parse_recipe({"name": "rotated", "scheme": scheme, "steps": steps})
    folder = Path(text()).parent / f"rotated-{[*CASES].index(name)}"
    settings = {"seq_len": 32, "samples": 4}
    nybble.quantize(str(model()), asked, text(), settings=settings, out=folder, target=TARGET)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_library_gives_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = export(rotated(name), tmp_path / "ct", TARGET, check=True)
    check = found["check"]
    assert check["weights"] == 14 and check["exact_in"] == "float32" and check["cosine"] > 1 - 1e-6
    assert any("transformers leaves transform_config out" in note for note in found["notes"])
    assert "leaves them out" in (tmp_path / "ct" / "README.md").read_text()
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]["transform_config"]
    assert TransformConfig.model_validate(config).model_dump(mode="json") == config
    (group,) = config["config_groups"].values()
    plain = name == "mxfp4"  # 96 is no power of two
    assert (group["type"], group["head_dim"]) == (
        "hadamard" if plain else "random-hadamard",
        CASES[name][1].get("block"),
    )
    (matrix,) = (t for n, t in load_file(tmp_path / "ct" / "model.safetensors").items() if "rotation" in n)
    assert bool((matrix.abs() == 1).all())
    ours, own = (logits(nybble.load(place, dtype="float32")[0]) for place in (rotated(name), tmp_path / "ct"))
    torch.testing.assert_close(own, ours, rtol=0, atol=1e-5 * float(ours.abs().max()))  # read again, as any other's
    monkeypatch.setattr(opening, "rotate_online", lambda model, folder: None)
    assert export(rotated(name), tmp_path / "again", TARGET, check=True)["check"]["cosine"] < 0.99  # it is they that do


@pytest.mark.parametrize("target", ["gguf", "mlx", "modelopt-nvfp4"])
def test_others_have_no_words_for_it(target: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"down_proj.*: an online rotation of its input .*--target dense folds it"):
        export(rotated("int4, whole"), tmp_path / "out", target)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match="online rotation"):
        convert(rotated("int4, whole"), tmp_path / "out", target, round="auto")


def test_float_weights_take_it_in(tmp_path: Path) -> None:
    found = export(rotated("int4, signs"), tmp_path / "out", "dense:float32", check=True)["check"]
    assert found["weights"] == 14 and found["cosine"] > 1 - 1e-6


def test_a_form_without_nybble_is_refused_at_once(tmp_path: Path) -> None:
    steps = [{"transform": "online-rotation"}]
    asked = parse_recipe({"name": "rotated", "scheme": {"weights": "int4 group=32"}, "steps": steps})
    with pytest.raises(SchemeError, match="--form compressed-tensors can't hold what online-rotation makes"):
        nybble.quantize(str(model()), asked, text(), out=tmp_path / "out", form=TARGET)
    assert not list(tmp_path.iterdir())


def test_siblings_that_differ(tmp_path: Path) -> None:
    steps = [{"transform": "online-rotation", "layers": "re:.*up_proj"}]
    asked = parse_recipe({"name": "rotated", "scheme": {"weights": "int4 group=32"}, "steps": steps})
    nybble.quantize(str(model()), asked, text(), out=tmp_path / "out")
    with pytest.raises(ModelError, match=r"gate_proj, .*up_proj: different online rotations"):
        export(tmp_path / "out", tmp_path / "ct", TARGET)
