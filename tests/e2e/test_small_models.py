"""benchmarks/small_models.py: a folder that nybble trains on, and of one seed the same weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import small_models
from tests.parts.data.test_images import write_idx

import nybble
from nybble.core.progress import Silent
from nybble.data.images import image_samples, preparation_for
from nybble.data.samples import InMemory
from nybble.eval import classification, classify
from nybble.training.tasks import TASKS, task_of

SIZES = {"resnet18": 11.2, "mobilenetv2": 2.2, "deit": 5.4, "detector": 0.2, "separator": 0.5}  # millions
KEYS = {"detector": "detection", "separator": "separation"}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Fashion-MNIST's files with as many images as a test has time for."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("t10k", 10)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28)), True)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(count) % 10, True)
    return tmp_path


def made(monkeypatch: pytest.MonkeyPatch, model: str, out: Path, *words: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["small_models.py", model, "--out", str(out), *words])
    small_models.main()
    found: dict[str, Any] = json.loads((out / "made.json").read_text())
    return found


def test_a_folder_that_tells_what_it_is(monkeypatch: pytest.MonkeyPatch, images: Path, tmp_path: Path) -> None:
    words = ["--images", str(images), "--steps", "2", "--batch", "4"]
    about = made(monkeypatch, "mobilenetv2", tmp_path / "a", *words)
    model, _ = nybble.load(tmp_path / "a", dtype="float32")
    prepared = json.loads((tmp_path / "a/preprocessor_config.json").read_text())
    wants = preparation_for(model.config, prepared)
    held = image_samples(str(images / "t10k-images-idx3-ubyte.gz"), wants, samples=None)
    assert held.labels is not None
    found = classification(classify(model, held.pixel_values), None, held.labels)
    assert about["held out"] == found and about["steps"] == 2 and about["test"]["used"] == 10
    made(monkeypatch, "mobilenetv2", tmp_path / "b", *words)
    made(monkeypatch, "mobilenetv2", tmp_path / "c", *words, "--seed", "1")
    a, b, c = ((tmp_path / each / "model.safetensors").read_bytes() for each in "abc")
    assert a == b != c


@pytest.mark.parametrize("name", ["detector", "separator"])
def test_those_of_drawn_examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """What made.json says is what the task measures of the folder."""
    about = made(monkeypatch, name, tmp_path / "a", "--steps", "2", "--batch", "2", "--train", "6", "--test", "4")
    model, _ = nybble.load(tmp_path / "a", dtype="float32")
    task, origin = task_of(model, name), InMemory(model.config)
    rows = task.load(about["test"]["source"], origin, model, 1, "evaluation").rows
    assert task.measure(model, origin, rows, 50, Silent()) == about["held out"]


@pytest.mark.parametrize(
    ("name", "millions"),
    list(SIZES.items()),
)
def test_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = small_models.KINDS[name].make()
    assert TASKS.key_of(task_of(model, name)) == KEYS.get(name, "images")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
