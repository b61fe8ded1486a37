"""``nybble search`` of an architecture: a model folder like any other, the same bytes behind a kill."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tests.e2e.test_train import _Stops
from tests.parts.data.test_labelled_images import NAMES, pictures
from tests.parts.training.test_images_task import VIT, model

from nybble.core.errors import FileError, SchemeError, UsageError
from nybble.pipelines.evaluate import run_eval
from nybble.pipelines.search_architecture import ArchitectureSettings, search_architecture
from nybble.search.architectures import Architecture, Found, Study, Training
from nybble.search.recipe import ArchitectureRecipe

pytest.importorskip("nybble.training.loop", reason="needs accelerate, which nybble's extra 'train' brings")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


@dataclass(frozen=True, kw_only=True)
class Whole(Architecture):
    """Finds the network that it was given, and trains it."""

    budgets: ClassVar[Mapping[str, str]] = {"parameters": "parameters"}
    training: Training = field(default_factory=lambda: Training(steps=4, batch=4, save_every=1))

    def check(self, study: Study) -> None:
        full = sum(p.numel() for p in study.model.parameters())
        study.budget.check(full, full)
        study.examples(study.model)

    def run(self, study: Study) -> Found:
        drawn = study.keep("drawn", lambda: torch.rand(2).tolist())
        run = study.train("retrain", study.model, study.examples(study.model).rows, self.training)
        full = sum(p.numel() for p in study.model.parameters())
        return Found(
            model=study.model, encoding={"width": [16, 16]}, cost=full, full=full, score="loss",
            measures=study.judge(study.model, study.held_out(study.model).rows),
            front=[{"cost": full, "score": run["curve"][-1][1], "name": "found"}],
            compared=[{"network": "found", "drawn": drawn[0]}], pictures={"it": b"png"}, files={"more.json": b"{}"},
        )  # fmt: skip


RECIPE = ArchitectureRecipe(name="whole", architecture=Whole())


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    folder, images = tmp_path / "model", pictures(tmp_path / "images", NAMES)
    model("ViTForImageClassification", "vit", VIT).save_pretrained(folder)
    wants = {"size": {"height": 16, "width": 16}, "image_mean": [0.6], "image_std": [0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(wants))
    return {"model": folder, "data": str(images), "judged_on": str(images), "method": RECIPE, "budget": "parameters=1"}


def test_what_is_found_is_a_model_folder(given: dict[str, Any], tmp_path: Path) -> None:
    """The measures are those of nybble eval on the folder; killed and gone on with the bytes are the same."""
    whole = search_architecture(out=tmp_path / "a", **given)
    assert whole["seconds"].keys() == {"retrain"}
    assert run_eval({"it": str(tmp_path / "a")}, given["data"])["models"]["it"] == {
        "top1": whole["measures"]["accuracy"]
    }
    with pytest.raises(KeyboardInterrupt):
        search_architecture(out=tmp_path / "b", progress=_Stops(3), **given)
    again = ArchitectureSettings(resume=True)
    with pytest.raises(FileError, match=r"begun with settings.seed = 0; now it is 1"):
        search_architecture(out=tmp_path / "b", settings={"resume": True, "seed": 1}, **given)
    search_architecture(out=tmp_path / "b", settings=again, **given)
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir() if p.name != "times.json"} for n in "ab"]
    assert files[0] == files[1]
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "more.json", "search.html"} < {*files[0]}
    assert "data:image/png;base64,cG5n" in files[0]["search.html"].decode()


def test_a_run_that_is_refused_before_anything_was_kept_leaves_nothing(given: dict[str, Any], tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Refusing(Whole):
        def run(self, study: Study) -> Found:
            raise UsageError("no such network")

    given["method"] = ArchitectureRecipe(name="refusing", architecture=Refusing())
    with pytest.raises(UsageError, match="no such network"):
        search_architecture(out=tmp_path / "out", **given)
    assert not (tmp_path / "out.partial").exists()


def test_options_reach_within(given: dict[str, Any], tmp_path: Path) -> None:
    given["options"] = {"training": {"steps": 3, "batch": 4, "lr": 1.0}, "training.steps": 1, "training.lr": 0.01}
    made = search_architecture(out=tmp_path / "a", **given)["request"]["method"]["architecture"]
    ((_, options),) = made.items()
    assert (options["training"]["steps"], options["training"]["lr"], options["training"]["batch"]) == (1, 0.01, 4)
    assert given["options"]["training"] == {"steps": 3, "batch": 4, "lr": 1.0}  # the caller's


def test_bad_requests_leave_nothing(given: dict[str, Any], tmp_path: Path) -> None:
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"budget": "parameters=0.5"}, UsageError, r"infeasible in this space; the least is [\d,]+, 1.000 of"),
        ({"budget": "parameters=10"}, UsageError, "a budget of 10 parameters"),
        ({"budget": "parameters=0"}, UsageError, "a number above 0"),
        ({"budget": "bytes=4"}, UsageError, "parameters=NUMBER; got 'bytes=4'"),
        ({"method": "fisher"}, UsageError, "chooses formats"),
        ({"data": None}, UsageError, "give --data SRC"),
        ({"options": {"training.step": 1}}, SchemeError, "no option 'training.step'.*training.steps"),
        ({"options": {"training.lr": "fast"}}, SchemeError, "training: lr is a float"),
    ]  # fmt: skip
    for changes, error, message in bad:
        with pytest.raises(error, match=message):
            search_architecture(out=tmp_path / "out", **{**given, **changes})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "model"]
