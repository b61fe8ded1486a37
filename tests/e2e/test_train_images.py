"""``nybble train`` of image classifiers: to a folder that judges alike, and the same bytes behind a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.test_train import _Stops, files
from tests.parts.data.test_labelled_images import NAMES, pictures
from tests.parts.training.test_images_task import RESNET, VIT, model
from torch import Tensor

import nybble
from nybble.core.errors import UsageError
from nybble.core.progress import Silent
from nybble.core.seeds import generator
from nybble.data.images import Preparation
from nybble.data.labelled_images import load_labelled_images
from nybble.nn.packed import Packed
from nybble.pipelines.evaluate import run_eval
from nybble.pipelines.load import load_with_origin
from nybble.pipelines.train import train
from nybble.training.settings import TrainSettings
from nybble.training.tasks import TASKS
from nybble.training.tasks._moves import Moves

loop = pytest.importorskip("nybble.training.loop", reason="needs accelerate, which nybble's extra 'train' brings")

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
SETTINGS = TrainSettings(
    steps=8, batch=4, accumulate=1, lr=1e-2, save_every=2, dtype="float32", augment="flip crop=2", clip=1.0
)
PREPARED = {"size": {"height": 16, "width": 16}, "image_mean": [0.6], "image_std": [0.3]}


@pytest.fixture(params=["ResNetForImageClassification", "ViTForImageClassification"])
def given(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """A model that says how it wants its images, and pictures in folders."""
    folder, vision = tmp_path / "model", "ViT" in request.param
    model(request.param, *(("vit", VIT) if vision else ("resnet", RESNET))).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARED))
    return {"model": folder, "data": pictures(tmp_path / "images", NAMES)}


def run(out: Path, given: dict[str, Any], settings: TrainSettings = SETTINGS, **more: Any) -> dict[str, Any]:
    return train(
        "qat", out=out, weights="int4 channel", activations="int8 tensor", judged_on=given["data"], settings=settings,
        options={"learned": {"weights": "lsq"}, "losses": {"task": 1, "logits": 1}}, **given, **more,
    )  # fmt: skip


@pytest.fixture
def seeds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of what moved images, in turn."""
    drawn_from: list[int] = []
    move = Moves.__call__

    def moved(self: Moves, images: Tensor, drawn: torch.Generator) -> Tensor:
        drawn_from.append(drawn.initial_seed())
        return move(self, images, drawn)

    monkeypatch.setattr(Moves, "__call__", moved)
    return drawn_from


def test_gone_on_with_it_comes_to_the_same_bytes(given: dict[str, Any], tmp_path: Path, seeds: list[int]) -> None:
    """Images are mirrored and shifted as they would have been; what is measured is what ``nybble eval`` says."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    first = run(whole, given)
    assert len(set(seeds)) == 8
    with pytest.raises(KeyboardInterrupt):
        run(out, given, progress=_Stops(5))
    assert run(out, given, replace(SETTINGS, resume=True))["curve"] == first["curve"]
    assert files(out, whole) == files(whole, whole)
    assert seeds[-4:] == seeds[4:8]
    before, after = (first["evaluation"]["models"][name] for name in ("before", "after"))
    assert after["loss"] < before["loss"] and after["accuracy"] > before["accuracy"]
    assert first["task"] == {"name": "images", "unit": "images", "shown": "accuracy"}
    page = (out / "report.html").read_text()
    assert "12 images" in page and "held out: Accuracy" in page
    assert json.loads((out / "preprocessor_config.json").read_text()) == PREPARED
    judged = run_eval({"it": str(out)}, given["data"])["models"]["it"]
    assert judged == {"top1": after["accuracy"]}
    made, _ = nybble.load(out)
    assert sum(isinstance(layer, Packed) for layer in made.modules()) > 3


def test_norms_are_measured_anew(tmp_path: Path) -> None:
    """What the file's own layers give of all images; by torch's way of the same. Behind a kill, the same bytes."""
    folder = tmp_path / "model"
    model("ResNetForImageClassification", "resnet", RESNET).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARED))
    images = pictures(tmp_path / "images", NAMES)
    asked: dict[str, Any] = {"model": folder, "data": images, "weights": "int3 channel", "activations": "int8 tensor"}
    asked["options"] = {"norm_batches": 99}
    whole, out, together = tmp_path / "whole", tmp_path / "out", replace(SETTINGS, batch=12)
    train("qat", out=whole, settings=together, **asked)
    with pytest.raises(KeyboardInterrupt):
        train("qat", out=out, settings=together, progress=_Stops(5), **asked)
    train("qat", out=out, settings=replace(together, resume=True), **asked)
    assert files(out, whole) == files(whole, whole)
    made, origin = load_with_origin(whole, dtype="float32")
    task = TASKS.get("images")
    rows = task.load(str(images), origin, made, 1, "evaluation").rows
    found = {name: t.clone() for name, t in made.state_dict().items() if "running" in name}
    torch.optim.swa_utils.update_bn([task.collate(rows)["pixel_values"]], made)
    assert len(found) > 4
    for name, t in found.items():
        torch.testing.assert_close(made.state_dict()[name], t, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="norm_batches is -1"):
        train("qat", out=tmp_path / "no", **{**asked, "options": {"norm_batches": -1}})


def test_what_is_wrong_is_said_before_anything_is_written(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="crop is 16, and images are 16 x 16"):
        run(tmp_path / "out", given, replace(SETTINGS, augment="crop=16"))
    assert not [*tmp_path.glob("out*")]


def test_the_network_sees_moved_images(tmp_path: Path) -> None:
    """The loss of the first update is that of the images as the generator of that update moves them."""
    made, task = model("ViTForImageClassification", "vit", VIT, hidden_dropout_prob=0.0), TASKS.get("images")
    wants = Preparation(height=16, width=16)
    rows = load_labelled_images(pictures(tmp_path / "images", NAMES), wants, NAMES).rows
    once = replace(SETTINGS, steps=1, batch=12)
    drawn = generator(once.seed, "train", "augment", "0", "0")
    order = [*loop._ByLength([1] * 12, once)]
    batch = task.augmentation(once.augment, rows)(task.collate([rows[i] for i in order]), drawn)
    expected = made(**batch).loss.item()
    run = loop.train(made, rows, once, tmp_path, Silent(), task=task)
    assert run.curve == [(1, pytest.approx(expected, rel=1e-6))]
