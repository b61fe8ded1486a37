"""Labelled images for training: every source gives the same examples; folders named as classes; what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.parts.data.test_images import WANTS, grey, write_idx

from nybble.core.errors import DataError, FileError
from nybble.data.images import Preparation, image_samples
from nybble.data.labelled_images import collate, load_labelled_images

NAMES = ["dark", "grey", "bright"]


def pictures(folder: Path, classes: list[str]) -> str:
    """Of ``grey``, in a folder for each class."""
    from PIL import Image

    images, labels = grey()
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / classes[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / classes[label] / f"{number:03}.png")
    return str(folder)


def test_rows_are_the_samples_that_a_judge_sees(tmp_path: Path) -> None:
    images, labels = grey()
    write_idx(tmp_path / "a-labels-idx1-ubyte", labels)
    idx = str(write_idx(tmp_path / "a-images-idx3-ubyte", images))
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    judged = image_samples(idx, WANTS, samples=None)
    for src in (idx, str(tmp_path / "a.npz")):
        found = load_labelled_images(src, WANTS, NAMES)
        batch = collate(found.rows)
        assert torch.equal(batch["pixel_values"], judged.pixel_values)
        assert judged.labels is not None and torch.equal(batch["labels"], judged.labels)
        assert found.manifest() | {"source": "", "note": ""} == {
            "source": "", "note": "", "sha256": found.sha256, "examples": 12, "targets": 12, "classes": 3,
            "size": [3, 16, 16],
        }  # fmt: skip
    assert [row["label"] for row in found.rows[2:5]] == labels[2:5].tolist() and found.rows[-1]["at"] == 11
    with pytest.raises(IndexError):
        found.rows[12]
    other = [
        load_labelled_images(idx, Preparation(height=8, width=16), NAMES).sha256,
        load_labelled_images(idx, WANTS, NAMES).sha256,
    ]
    images[3, 2, 1] += 1
    np.savez(tmp_path / "b.npz", images=images, labels=labels)
    assert len({*other, load_labelled_images(str(tmp_path / "b.npz"), WANTS, NAMES).sha256}) == 3


def test_folders_that_bear_the_names_of_classes(tmp_path: Path) -> None:
    """In the model's order for a judge, too; other names count in their own order."""
    src = pictures(tmp_path / "named", NAMES)  # in the order of names: bright, dark, grey
    found = load_labelled_images(src, WANTS, NAMES)
    assert [row["label"] for row in found.rows] == [2] * 4 + [0] * 4 + [1] * 4
    assert image_samples(src, WANTS, samples=None, classes=NAMES).labels.tolist() == found.rows.labels  # type: ignore[union-attr]
    other = pictures(tmp_path / "others", ["z", "y", "x"])
    assert [row["label"] for row in load_labelled_images(other, WANTS, NAMES).rows] == [0] * 4 + [1] * 4 + [2] * 4
    mixed = pictures(tmp_path / "mixed", ["dark", "grey", "white"])
    with pytest.raises(DataError, match=r"a folder 'white', which is no class of the model, beside .*'dark'"):
        load_labelled_images(mixed, WANTS, NAMES)


def test_what_is_refused(tmp_path: Path) -> None:
    images, labels = grey()
    np.savez(tmp_path / "none.npz", images=images)
    np.savez(tmp_path / "far.npz", images=images, labels=np.where(np.arange(12) == 7, 3, labels))
    np.savez(tmp_path / "half.npz", images=images, labels=labels / 2)
    np.savez(tmp_path / "empty.npz", images=images[:0], labels=labels[:0])
    broken = Path(pictures(tmp_path / "broken", NAMES))
    (broken / "dark" / "000.png").write_bytes(b"no picture")
    for name, kind, message in (
        ("none.npz", DataError, "has no labels: give an IDX file"),
        ("far.npz", DataError, "image 7: label 3, and the model's head has 3 classes, 0 to 2"),
        ("half.npz", DataError, "labels of float64"),
        ("empty.npz", DataError, "holds no images"),
        ("broken", FileError, "000.png can't be read as a picture"),
    ):
        with pytest.raises(kind, match=message):
            load_labelled_images(str(tmp_path / name), WANTS, NAMES)
