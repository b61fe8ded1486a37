"""Images: every kind of source gives the same pixels, and a tiny ViT goes from a folder to its top-1."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import nybble
from nybble.checkpoint.account import inspect
from nybble.core.errors import DataError, FileError, ModelError, UsageError
from nybble.data.images import Preparation, image_samples, preparation_for
from nybble.eval import classification, classify
from nybble.pipelines.evaluate import run_eval
from nybble.pipelines.generate import generate
from nybble.pipelines.request import build_recipe

WANTS = Preparation(height=16, width=16, channels=3, mean=(0.5,), std=(0.5,))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def grey(count: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Pictures that differ by class, and their classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    images = rng.integers(0, 60, (count, 16, 16)) + 90 * labels[:, None, None]
    return images.astype(np.uint8), labels


def write_idx(path: Path, values: np.ndarray, compressed: bool = False) -> Path:
    content = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if compressed else content)
    return path


@pytest.mark.parametrize("kind", ["idx", "idx.gz", "npy", "npz", "folder"])
def test_every_source_gives_the_same(tmp_path: Path, kind: str) -> None:
    images, labels = grey()
    path = tmp_path / "set"
    if kind.startswith("idx"):
        end = ".gz" if kind.endswith("gz") else ""
        path = write_idx(tmp_path / f"train-images-idx3-ubyte{end}", images, bool(end))
        write_idx(tmp_path / f"train-labels-idx1-ubyte{end}", labels, bool(end))
    elif kind == "npy":
        path = tmp_path / "set.npy"
        np.save(path, images)
    elif kind == "npz":
        path = tmp_path / "set.npz"
        np.savez(path, images=images, labels=labels)
    else:
        from PIL import Image

        order = np.argsort(labels, kind="stable")
        images, labels = images[order], labels[order]
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            (path / f"class{label}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path / f"class{label}" / f"{number:03}.png")
    found = image_samples(str(path), WANTS, samples=None)
    expected = (torch.from_numpy(images).float() / 255 - 0.5) / 0.5
    assert torch.allclose(found.pixel_values, expected[:, None].expand(-1, 3, -1, -1), atol=1e-6)
    assert found.available == 12
    assert (found.labels is None) == (kind == "npy")
    if found.labels is not None:
        assert found.labels.tolist() == labels.tolist()
    few = image_samples(str(path), WANTS, samples=4, seed=1)
    assert few.pixel_values.shape == (4, 3, 16, 16) and few.sha256 != found.sha256


def test_resized_pixels_are_bytes_as_pillow_has_them(tmp_path: Path) -> None:
    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 256, (50, 37, 3)).astype(np.uint8)
    np.save(tmp_path / "x.npy", picture[None])
    plain = Preparation(height=16, width=20, channels=3, mean=(0.0,), std=(1.0,))
    found = image_samples(str(tmp_path / "x.npy"), plain, samples=None).pixel_values[0] * 255
    theirs = np.array(Image.fromarray(picture).resize((20, 16), Image.Resampling.BILINEAR))
    assert (found - found.round()).abs().max() < 1e-4
    assert (found.permute(1, 2, 0) - torch.from_numpy(theirs).float()).abs().max() < 1.01


def test_size_and_preparation(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((2, 40, 30, 3), 51, np.uint8))
    wants = Preparation(height=8, width=8, channels=1, mean=(0.1,), std=(0.2,))
    found = image_samples(str(tmp_path / "x.npy"), wants, samples=None).pixel_values
    assert found.shape == (2, 1, 8, 8)
    assert torch.allclose(found, torch.full_like(found, (0.2 - 0.1) / 0.2))
    config = transformers.ViTConfig(image_size=32, num_channels=3)
    made = preparation_for(config, {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]})
    assert (made.height, made.channels, made.mean) == (32, 3, (0.1, 0.2, 0.3))
    with pytest.raises(DataError, match="don't fit 3 channels"):
        preparation_for(config, {"image_mean": [0.1, 0.2], "image_std": [1, 1, 1]})


def test_bad_sources(tmp_path: Path) -> None:
    images, labels = grey()
    write_idx(tmp_path / "a-images-idx3-ubyte", images)
    write_idx(tmp_path / "a-labels-idx1-ubyte", labels[:5])
    whole = write_idx(tmp_path / "b-images-idx3-ubyte", images)
    whole.write_bytes(whole.read_bytes()[:-7])
    np.save(tmp_path / "floats.npy", images.astype(np.float32))
    np.savez(tmp_path / "none.npz", other=images)
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("words")
    for name, kind, message in (
        ("a-images-idx3-ubyte", DataError, "doesn't belong to it"),
        ("b-images-idx3-ubyte", FileError, "truncated"),
        ("floats.npy", DataError, "float32"),
        ("none.npz", FileError, "can't be read as images"),
        ("objects.npy", FileError, "can't be read as images"),
        ("empty", DataError, "holds no pictures"),
        ("text.txt", UsageError, "no image set that nybble knows"),
        ("missing.npy", FileError, "does not exist"),
    ):
        with pytest.raises(kind, match=message):
            image_samples(str(tmp_path / name), WANTS, samples=None)
    np.save(tmp_path / "good.npy", images)
    with pytest.raises(DataError, match="12 images, fewer than the 20"):
        image_samples(str(tmp_path / "good.npy"), WANTS, samples=20)


def test_metrics() -> None:
    ours, theirs, labels = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 2, 2])
    assert classification(ours, theirs, labels) == {"top1": 0.75, "agreement": 0.75}
    assert classification(ours, None, labels) == {"top1": 0.75}
    model: Any = transformers.ViTModel(
        transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ModelError, match="gives no logits"):
        classify(model, torch.zeros(1, 3, 224, 224))


def test_vit_from_a_folder_to_its_top1(tmp_path: Path) -> None:
    """A ViT trained for a moment on pictures that differ in brightness; 8 bits keep it, and its files say it all."""
    images, labels = grey(48)
    write_idx(tmp_path / "t-images-idx3-ubyte", images)
    write_idx(tmp_path / "t-labels-idx1-ubyte", labels)
    data = str(tmp_path / "t-images-idx3-ubyte")
    make: Any = transformers.ViTConfig
    config = make(
        image_size=16, patch_size=8, num_channels=3, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.ViTForImageClassification(config)
    samples = image_samples(data, WANTS, samples=None)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    model.train()
    for _ in range(60):
        loss = model(pixel_values=samples.pixel_values, labels=samples.labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path / "float")
    preprocessor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "float" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    line = "float8_e4m3fn tensor static"
    recipe = build_recipe("llm-fp4", weights="float8_e4m3fn channel", activations=line, matmuls=line, effort="quick")
    settings = nybble.Settings(samples=16, batch=8, dtype=torch.float32)
    nybble.quantize(str(tmp_path / "float"), recipe, data, out=tmp_path / "out", settings=settings)
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == preprocessor
    assert inspect(tmp_path / "out")["total"] > 0
    specs = {"quantized": str(tmp_path / "out"), "float": str(tmp_path / "float")}
    found = run_eval(specs, data, reference=str(tmp_path / "float"))
    assert found["models"]["float"]["top1"] > 0.9 and found["models"]["float"]["agreement"] == 1
    assert found["models"]["quantized"]["agreement"] > 0.9
    assert found["data"]["samples"] == 48
    with pytest.raises(UsageError, match="a model of images is judged by top1, agreement; not by ppl"):
        run_eval(specs, data, metrics=["ppl"], reference=str(tmp_path / "float"))
    with pytest.raises(UsageError, match="calibrated on images"):
        nybble.quantize(str(tmp_path / "float"), recipe, "builtin", settings=settings)
    with pytest.raises(ModelError, match="generates no text"):
        generate(str(tmp_path / "out"), "Hello")
