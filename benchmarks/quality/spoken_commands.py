"""Ten spoken commands by a synthesiser: words, voices, and the 49 x 10 coefficients that DS-CNN reads.

    apt-get install espeak-ng

Each utterance has a voice, a speed and a pitch of its own, noise, and a place within its second. Voices that train and
voices that judge are different ones. Speech made by a synthesiser shows changes, not how people are understood.
Features: 40 ms windows every 20 ms, 40 mel bands, the first 10 coefficients of their cosine transform (Davis and
Mermelstein 1980, as Zhang et al. 2017, arXiv:1711.07128, take them).
"""

from __future__ import annotations

import io
import math
import shutil
import subprocess
import wave
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
TRAIN = tuple(
    f"{accent}+{v}" for accent in ("en-us", "en-gb") for v in ("m1", "m2", "m3", "m4", "m5", "f1", "f2", "f3")
)
TEST = tuple(f"{accent}+{v}" for accent in ("en-us", "en-gb") for v in ("m6", "m7", "f4", "f5"))
RATE, WINDOW, HOP, BANDS, KEPT = 22050, 882, 441, 40, 10
SHAPE = (1, 49, KEPT)


def utterances(count: int, voices: Sequence[str], seed: int) -> tuple[Tensor, Tensor]:
    """Features ``[count, 1, 49, 10]`` and words' numbers ``[count]``."""
    if shutil.which("espeak-ng") is None:
        raise SystemExit("espeak-ng isn't on the path; apt-get install espeak-ng")
    drawn = np.random.default_rng(seed)
    labels = torch.from_numpy(drawn.integers(len(WORDS), size=count))
    features = [
        coefficients(_second(_spoken(WORDS[label], voices[drawn.integers(len(voices))], drawn), drawn))
        for label in labels
    ]
    return torch.stack(features)[:, None], labels


def normalised(x: Tensor, of: Tensor) -> Tensor:
    """To mean 0 and deviation 1 of each coefficient of ``of``."""
    return (x - of.mean((0, 1, 2))) / of.std((0, 1, 2))


def coefficients(sound: Tensor) -> Tensor:
    """One second ``[22050]`` -> ``[49, 10]``."""
    frames = sound.unfold(0, WINDOW, HOP) * torch.hann_window(WINDOW, periodic=False)
    power = torch.fft.rfft(frames).abs() ** 2
    bands = torch.log(power @ _filters().T + 1e-6)
    angle = math.pi / BANDS * (torch.arange(BANDS) + 0.5)
    return bands @ torch.cos(angle[:, None] * torch.arange(KEPT))


def _filters() -> Tensor:
    """Triangles between 20 and 4,000 Hz, equally wide on the mel scale: ``[40, 442]``."""
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in (20.0, 4000.0))
    edges = 700 * (10 ** (torch.linspace(low, high, BANDS + 2) / 2595) - 1)
    at = torch.linspace(0, RATE / 2, WINDOW // 2 + 1)
    rising = (at - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - at) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0)


def _spoken(word: str, voice: str, drawn: np.random.Generator) -> Tensor:
    speed, pitch = drawn.integers(120, 220), drawn.integers(20, 80)
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", word]
    said = subprocess.run(command, capture_output=True, check=True).stdout
    with wave.open(io.BytesIO(said)) as sound:  # a stream's header has no true length
        samples = np.frombuffer(sound.readframes(RATE * 10), np.int16)
    return torch.from_numpy(samples.astype(np.float32) / 32768)


def _second(sound: Tensor, drawn: np.random.Generator) -> Tensor:
    """A second with the sound somewhere in it, at some loudness, over noise."""
    sound = sound[:RATE]
    found = torch.from_numpy(drawn.normal(0, 10 ** drawn.uniform(-4, -2), RATE).astype(np.float32))
    start = int(drawn.integers(RATE - len(sound) + 1))
    found[start : start + len(sound)] += float(drawn.uniform(0.3, 1)) * sound
    return found
