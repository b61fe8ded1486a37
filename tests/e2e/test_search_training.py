"""``nybble search --method fliqs``: formats are searched while nybble's trainer trains; what comes out is packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.e2e.test_train import _Stops
from tests.parts.data.test_labelled_images import NAMES, pictures
from tests.parts.training.test_images_task import RESNET, model

import nybble
from nybble.core.errors import NybbleError, SchemeError, UsageError
from nybble.nn.layer import QuantLayer
from nybble.pipelines.load import load_with_origin
from nybble.pipelines.quantize import quantize
from nybble.pipelines.search_job import SearchSettings
from nybble.scheme import parse_scheme

pytest.importorskip("nybble.training.loop", reason="needs accelerate, which nybble's extra 'train' brings")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")

PREPARED = {"size": {"height": 16, "width": 16}, "image_mean": [0.6], "image_std": [0.3]}
TRAINING = {"steps": 6, "batch": 4, "save_every": 2}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model that says how it wants its images, and pictures in folders."""
    place = tmp_path_factory.mktemp("given")
    model("ResNetForImageClassification", "resnet", RESNET).save_pretrained(place / "model")
    (place / "model" / "preprocessor_config.json").write_text(json.dumps(PREPARED))
    return {"model": place / "model", "data": str(pictures(place / "images", NAMES))}


def run(out: Path, given: dict[str, Any], **changes: Any) -> dict[str, Any]:
    asked = {"budget": "bops=2000000", "menu": "int4,e4m3,bf16", "method": "fliqs", "training": TRAINING, **changes}
    found: dict[str, Any] = nybble.search(out=out, **{**given, **asked})
    return found


def held(folder: Path) -> dict[str, bytes]:
    """All files but those that hold seconds."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "logs" not in path.parts)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.name != "times.json"}


def test_what_is_packed_is_what_was_found_within_the_budget(given: dict[str, Any], tmp_path: Path) -> None:
    found = run(tmp_path / "out", given, judged_on=given["data"])
    assert found["total"] <= found["limit"] == 2000000
    assert found["total"] == sum(row["cost"] for row in found["layers"])
    bits = {"int4": 4, "e4m3": 8, "bf16": 16}
    assert all(row["cost"] == row["macs"] * bits[row["chosen"]] ** 2 for row in found["layers"])
    packed, _ = load_with_origin(tmp_path / "out" / "model")
    for row in found["layers"]:
        layer = packed.get_submodule(row["name"])
        assert isinstance(layer, QuantLayer) and layer.inputs is not None
        assert str(layer.inputs.quantizer) == row["inputs"]
        assert str(layer.weight.spec["format"]) == row["weights"].split()[0]  # type: ignore[union-attr]
    assert set(found["evaluation"]["models"]) == {"float", "before", "after"}
    scheme = parse_scheme(yaml.safe_load((tmp_path / "out" / "scheme.yaml").read_text()))
    quantize(given["model"], "rtn", given["data"], out=tmp_path / "q", scheme=scheme, form="native")
    updates = found["policy"]
    drawn = updates["cost"][:5]  # from 0.9 of the updates on nothing is drawn
    assert len(set(drawn)) > 3 and updates["cost"][5] == found["total"] and found["steps"] == 6
    assert updates["entropy"][0] > updates["entropy"][5]
    page = (tmp_path / "out" / "search.html").read_text()
    assert 'href="model/report.html"' in page and (tmp_path / "out" / "model" / "report.html").is_file()


def test_killed_and_resumed_ends_with_the_same_bytes(given: dict[str, Any], tmp_path: Path) -> None:
    """Logits, moments, the running mean and choices are in the checkpoint."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(whole, given)
    with pytest.raises(KeyboardInterrupt):
        run(out, given, progress=_Stops(3))
    run(out, given, settings=SearchSettings(resume=True))
    assert held(out) == held(whole)


def test_a_fixed_input_and_a_method_of_its_own(given: dict[str, Any], tmp_path: Path) -> None:
    """Weights alone are searched; a YAML file says the policy, as published without an end of its own."""
    recipe = {"loop": {"policy": {"reward": "soft", "beta": -0.5}}, "training": {"settings": {"lr": 1e-3}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    found = run(
        tmp_path / "out", given, method=str(tmp_path / "own.yaml"), activations="int8", budget="bits=5",
        menu="int2,int8", training={**TRAINING, "steps": 2},
    )  # fmt: skip
    assert {row["inputs"] for row in found["layers"]} == {"int8"}
    assert found["compared"][1] == {"name": "uniform int2", "cost": 2.0, "fits": True}


def test_bad_requests_leave_nothing(given: dict[str, Any], tmp_path: Path) -> None:
    bad: list[tuple[dict[str, Any], type[NybbleError], str]] = [
        ({"budget": "bops=1000"}, UsageError, "1,000.0 bit operations of a sample is infeasible.*the least is"),
        ({"menu": "int4,e4m3,int4 channel / int4"}, UsageError, r"has 'int4 channel / int4' twice \(as 'int4'\)"),
        ({"menu": ""}, UsageError, "the menu is empty"),
        ({"method": "fisher"}, UsageError, "method fisher trains nothing"),
        ({"training": {"lrr": 1}}, UsageError, "lrr"),
        ({"groups": [["classifier.1"]]}, UsageError, "is in no group"),
    ]  # fmt: skip
    for changes, error, message in bad:
        with pytest.raises(error, match=message):
            run(tmp_path / "out", given, **changes)
        assert not list(tmp_path.iterdir()), changes
    for text, message in (
        ("{loop: policy, training: 3}", "training has mappings of options and settings"),
        ("{loop: policy, training: {}, sensitivity: kl}", "measures no sensitivity"),
        ("{loop: policy}", "lacks a sensitivity"),
    ):
        (tmp_path / "own.yaml").write_text(text)
        with pytest.raises(SchemeError, match=message):
            run(tmp_path / "out", given, method=str(tmp_path / "own.yaml"))
