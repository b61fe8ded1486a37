"""Drawn images of six classes, stripes of six directions, and a convolutional classifier that has learned them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from nybble.data.images import Preparation
from nybble.models.own.microcontroller import MicrocontrollerConfig, MicrocontrollerForImageClassification

CLASSES, SIDE = 6, 12
WANTS = Preparation(height=SIDE, width=SIDE, channels=1, mean=(0.5,), std=(0.27,))


def patterns(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 [count, 12, 12], and their classes."""
    rng, (rows, columns) = np.random.default_rng(seed), np.mgrid[:SIDE, :SIDE]
    labels, found = np.arange(count) % CLASSES, []
    for label in labels:
        angle, wave, phase = np.pi * label / CLASSES, rng.uniform(0.8, 1.3), rng.uniform(0, 2 * np.pi)
        stripes = np.sin(wave * (rows * np.sin(angle) + columns * np.cos(angle)) + phase)
        found.append(stripes * rng.uniform(0.5, 1) + rng.normal(0, 0.25, (SIDE, SIDE)))
    return np.clip(128 + 100 * np.array(found), 0, 255).astype(np.uint8), labels


def pixels(images: np.ndarray) -> torch.Tensor:
    """As the classifier takes them, float32 [count, 1, 12, 12]."""
    return ((torch.from_numpy(images).float() / 255 - 0.5) / 0.27)[:, None]


@cache
def _state() -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    images, labels = patterns(480, 0)
    x, y = pixels(images), torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = fresh()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        model.train()
        for _ in range(60):
            chosen = torch.randint(len(x), (64,))
            loss = functional.cross_entropy(model(x[chosen]).logits, y[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    found: dict[str, torch.Tensor] = model.state_dict()
    return found


def fresh(norm: str = "batch") -> Any:
    """The classifier with random weights."""
    config = MicrocontrollerConfig(image_size=(SIDE, SIDE), width=8, norm=norm, num_labels=CLASSES)
    return MicrocontrollerForImageClassification(config)


def teacher() -> Any:
    """The classifier that has learned them; a new one at each call."""
    made = fresh()
    made.load_state_dict(_state())
    return made.eval()


def save_teacher(folder: Path) -> Path:
    """The same as a folder of transformers."""
    teacher().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5], "image_std": [0.27]}))
    return folder
