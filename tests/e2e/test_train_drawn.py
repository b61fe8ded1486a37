"""``nybble train`` of the detector and of the separator: what is measured is what the folder does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.parts.training.test_drawn_tasks import detector, separator

import nybble
from nybble.core.progress import Silent
from nybble.data.samples import InMemory
from nybble.nn.packed import Packed
from nybble.pipelines.train import train
from nybble.training.settings import TrainSettings
from nybble.training.tasks import task_of

pytest.importorskip("nybble.training.loop", reason="needs accelerate, which nybble's extra 'train' brings")
SETTINGS = TrainSettings(steps=6, batch=4, accumulate=1, lr=5e-3, dtype="float32", clip=1.0)


@pytest.mark.parametrize(("made", "word"), [(detector(), "scenes"), (separator(), "voices")], ids=["scenes", "voices"])
def test_from_a_folder_to_a_folder(tmp_path: Path, made: Any, word: str) -> None:
    made.save_pretrained(tmp_path / "model")
    found = train(
        "qat", tmp_path / "model", tmp_path / "out", f"{word}:12", judged_on=f"{word}:4", settings=SETTINGS,
        weights="int4 channel", activations="int8 tensor", options={"learned": {"weights": "lsq"}},
    )  # fmt: skip
    before, after = (found["evaluation"]["models"][name] for name in ("before", "after"))
    assert after["loss"] < before["loss"]
    back, _ = nybble.load(tmp_path / "out")
    assert sum(isinstance(layer, Packed) for layer in back.modules()) > 4
    task, origin = task_of(back, "it"), InMemory(back.config)
    rows = task.load(f"{word}:4", origin, back, 1, "evaluation").rows
    assert task.measure(back, origin, rows, 8, Silent()) == after
