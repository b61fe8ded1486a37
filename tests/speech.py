"""Sounds with transcripts, and tiny models that hear them."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nybble.models.own.recognizer import Recognizer, RecognizerConfig

WORDS = ("one", "two", "three", "four", "five", "six", "seven")


def save_wav(path: Path, sound: np.ndarray, rate: int = 16000, width: int = 2) -> Path:
    """Write float samples [samples] or [samples, channels], -1 .. 1, as whole numbers of ``width`` bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = np.round(sound.astype(np.float64) * (2.0 ** (8 * width - 1) - 1)).astype("<i8")
    content = (steps + 128).astype(np.uint8) if width == 1 else steps[..., None].view(np.uint8)[..., :width]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if sound.ndim == 1 else sound.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.ascontiguousarray(content).tobytes())
    return path


def tone(number: int, rate: int = 16000) -> np.ndarray:
    """A gliding tone over noise, float64; longer for higher numbers."""
    rng = np.random.default_rng(number)
    time = np.arange(int(rate * (0.25 + 0.03 * number))) / rate
    return 0.4 * np.sin(2 * np.pi * (300 + 150 * number + 400 * time) * time) + rng.normal(0, 0.01, len(time))


def save_speech(folder: Path, count: int = 4) -> Path:
    """A folder of WAV files with a .txt beside each."""
    for number in range(count):
        save_wav(folder / f"{number}.wav", tone(number))
        (folder / f"{number}.txt").write_text(f"{WORDS[number]} {WORDS[-1 - number]}\n")
    return folder


def tiny_recognizer(**more: Any) -> Any:
    """In eval mode, with BatchNorm statistics that aren't those of a new one."""
    sizes: dict[str, Any] = {
        "mels": 16, "widths": (12, 16), "kernels": (5, 7), "first": (8, 5), "last": ((16, 3, 2), (24, 1, 1)),
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = Recognizer(RecognizerConfig(**{**sizes, **more}))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.2, 0.6)
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.2)
    return model.eval()
