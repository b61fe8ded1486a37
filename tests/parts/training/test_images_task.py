"""The task of image classifiers: which models have it, the model's own loss, moved images, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.parts.data.test_images import grey
from torch.nn import functional

from nybble.core import ranks
from nybble.core.errors import DataError, ModelError, NybbleError, SchemeError, UsageError
from nybble.core.progress import Silent
from nybble.data.samples import InMemory
from nybble.training.sharing import check_alone
from nybble.training.tasks import TASKS, task_of
from nybble.training.tasks._moves import parse_moves

CLASSES: dict[str, Any] = {"id2label": {0: "dark", 1: "grey", 2: "bright"}}
VIT: dict[str, Any] = {
    "image_size": 16, "patch_size": 8, "num_channels": 3, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, **CLASSES,
}  # fmt: skip
RESNET: dict[str, Any] = {
    "num_channels": 3, "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic", **CLASSES,
}  # fmt: skip
MODELS = [
    ("ViTForImageClassification", "vit", VIT), ("DeiTForImageClassification", "deit", VIT),
    ("ResNetForImageClassification", "resnet", RESNET),
    ("MobileNetV2ForImageClassification", "mobilenet_v2", {"image_size": 16, "depth_multiplier": 0.1, **CLASSES}),
]  # fmt: skip


def model(name: str, family: str, config: dict[str, Any], **more: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return getattr(transformers, name)(transformers.AutoConfig.for_model(family, **{**config, **more})).eval()


@pytest.mark.parametrize(("name", "family", "config"), MODELS)
def test_measures_are_the_models_own(tmp_path: Path, name: str, family: str, config: dict[str, Any]) -> None:
    images, labels = grey()
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    made = model(name, family, config)
    origin: Any = InMemory(made.config)
    if family == "resnet":
        made.config.image_size = 16  # it takes any, and says none
    task = task_of(made, "it")
    assert TASKS.key_of(task) == "images"
    rows = task.load(str(tmp_path / "a.npz"), origin, made, 512, "evaluation").rows
    with torch.no_grad():
        output = made(**task.collate(rows))
    found = task.measure(made, origin, rows, 5, Silent())
    assert found["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    assert found["accuracy"] == (output.logits.argmax(-1).numpy() == labels).mean()
    shown = task.samples(made, origin, rows)
    assert [each["target"] for each in shown] == ["dark", "grey", "bright"]
    assert shown[1]["text"] == ("dark", "grey", "bright")[int(output.logits[1].argmax())]
    assert task.counted({}, output.logits).shape == (12,)


def test_other_models_are_left_alone() -> None:
    task = TASKS.get("images")
    bert: Any = transformers.AutoConfig.for_model("bert", hidden_size=16, intermediate_size=16, num_attention_heads=2)
    assert not task.claims(transformers.BertForSequenceClassification(bert))
    assert not task.claims(model("ViTModel", "vit", VIT))
    assert not task.claims(model("ViTForImageClassification", "vit", VIT, id2label={0: "score"}))
    several = model("ViTForImageClassification", "vit", VIT, problem_type="multi_label_classification")
    with pytest.raises(ModelError, match="problem_type 'multi_label_classification', and classifiers"):
        task.check(several, "it", 512)
    with pytest.raises(UsageError, match="is trained on images; give them with --data"):
        task.load("builtin", InMemory(several.config), several, 512, "calibration")
    silent = model("ResNetForImageClassification", "resnet", RESNET)
    with pytest.raises(DataError, match="how large its images are"):
        task.load("x.npz", InMemory(silent.config), silent, 512, "calibration")


def test_moved_images() -> None:
    """Against torch's own padding: each is a window of the image with its edges repeated, mirrored or not."""
    images = torch.arange(6 * 2 * 5 * 7, dtype=torch.float32).reshape(6, 2, 5, 7)
    moves = parse_moves("flip crop=2", (5, 7))
    assert moves is not None
    found = moves(images, torch.Generator().manual_seed(0))
    places = []
    for image, moved in zip(images, found, strict=True):
        wide = functional.pad(image[None], (2, 2, 2, 2), mode="replicate")[0]
        windows = {
            (flip, y, x): wide[:, y : y + 5, x : x + 7].flip(-1) if flip else wide[:, y : y + 5, x : x + 7]
            for flip in (0, 1) for y in range(5) for x in range(5)
        }  # fmt: skip
        (place,) = [key for key, window in windows.items() if torch.equal(window, moved)]
        places.append(place)
    assert {flip for flip, _, _ in places} == {0, 1} and len(set(places)) > 3
    assert torch.equal(moves(images, torch.Generator().manual_seed(0)), found)
    assert not torch.equal(moves(images, torch.Generator().manual_seed(1)), found)
    mirrored = parse_moves("flip", (5, 7))
    assert mirrored is not None
    for image, moved in zip(images, mirrored(images, torch.Generator().manual_seed(0)), strict=True):
        assert torch.equal(moved, image) or torch.equal(moved, image.flip(-1))
    assert parse_moves("", (5, 7)) is None


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ("mirror", UsageError, "'mirror' is not of the form"),
        ("rotate=3", SchemeError, "has no option 'rotate'"),
        ("crop=5", UsageError, "crop is 5, and images are 5 x 7; give 0 to 4"),
        ("crop=-1", UsageError, "crop is -1"),
    ],
)
def test_moves_that_there_are_not(line: str, kind: type[NybbleError], message: str) -> None:
    with pytest.raises(kind, match=message):
        parse_moves(line, (5, 7))
    with pytest.raises(UsageError, match=r"causal language models, .* have no augmentation"):
        TASKS.get("language").augmentation(line, [])


def test_averages_of_batches_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model("ResNetForImageClassification", "resnet", RESNET)
    check_alone(made)
    monkeypatch.setattr(ranks, "size", lambda: 2)
    check_alone(model("ViTForImageClassification", "vit", VIT))
    with pytest.raises(UsageError, match=r"normalization \(BatchNorm2d\) keeps averages .* 2 processes"):
        check_alone(made)
