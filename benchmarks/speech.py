"""Speech made by a synthesiser, as a folder of WAV files with transcripts.jsonl: to train, calibrate and judge on.

    apt-get install espeak-ng
    python benchmarks/speech.py --out speech/train --count 20000
    python benchmarks/speech.py --out speech/test --count 500 --part test

Utterances have 2 to 6 words; voices, words and texts of ``--part test`` are in none of ``train``. Speed and pitch are
drawn for each. 16,000 samples a second, 16 bits. Speech made by a synthesiser shows changes, not how people are
understood.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nybble.core.files import AtomicFolder
from nybble.core.progress import Bars, task

RATE = 16000
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-us-nyc", "en-029")
TRAIN = ("m1", "m2", "m3", "m4", "m5", "f1", "f2", "f3", "klatt", "croak", "Andy", "Annie")
TEST = ("m6", "m7", "f4", "f5")
TRAIN_WORDS = """one two three four five six seven eight nine ten red green blue black white open close start stop
play pause next last up down left right call send read write find show the a my your this that light
door window music message kitchen garden morning evening today tomorrow please now again and or not
with from into"""
TEST_WORDS = """eleven twelve yellow silver begin finish raise lower under over lamp house letter table summer winter
never always some every"""


def utterances(count: int, part: str, seed: int) -> list[tuple[str, str, int, int]]:
    """Text, voice, words a minute and pitch of each; half of a test utterance's words are new ones."""
    drawn = np.random.default_rng([seed, part == "test"])
    voices = [f"{accent}+{voice}" for accent in ACCENTS for voice in (TRAIN if part == "train" else TEST)]
    found = []
    for _ in range(count):
        size = int(drawn.integers(2, 7))
        words = [str(word) for word in drawn.choice(TRAIN_WORDS.split(), size)]
        if part == "test":
            new = drawn.permutation(size)[: max(1, size // 2)]
            words = [str(drawn.choice(TEST_WORDS.split())) if i in new else word for i, word in enumerate(words)]
        voice = voices[drawn.integers(len(voices))]
        found.append((" ".join(words), voice, int(drawn.integers(120, 200)), int(drawn.integers(25, 75))))
    return found


def spoken(command: str, text: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """int16 samples at 16,000 a second."""
    asked = [command, "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", text]
    said = subprocess.run(asked, capture_output=True, check=True).stdout
    with wave.open(io.BytesIO(said)) as sound:  # a stream's header has no true length
        samples = np.frombuffer(sound.readframes(sound.getframerate() * 60), np.int16)
        return resampled(samples, sound.getframerate())


def resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    """int16 at ``RATE``, from a higher rate: what is above half of it is cut off in the spectrum."""
    count = round(len(samples) * RATE / rate)
    spectrum = np.fft.rfft(samples.astype(np.float64))[: count // 2 + 1]
    found = np.fft.irfft(spectrum, count) * count / len(samples)
    return np.clip(np.round(found), -32768, 32767).astype("<i2")


def write(path: Path, samples: np.ndarray) -> None:
    """One WAV file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())


def main(given: Sequence[str] | None = None) -> None:
    """Make a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--part", choices=("train", "test"), default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--espeak", default="espeak-ng", help="the command")
    args = parser.parse_args(given)
    if shutil.which(args.espeak) is None:
        raise SystemExit(f"{args.espeak} isn't on the path; apt-get install espeak-ng")
    asked = utterances(args.count, args.part, args.seed)
    lines, total = [], 0
    with AtomicFolder(args.out) as partial, task(Bars(), len(asked), "utterances") as bar:
        for number, (text, voice, speed, pitch) in enumerate(asked):
            samples, name = spoken(args.espeak, text, voice, speed, pitch), f"{number:06d}.wav"
            write(partial / name, samples)
            lines.append(json.dumps({"audio": name, "text": text, "voice": voice}) + "\n")
            total += len(samples)
            bar.advance()
        (partial / "transcripts.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{args.out}: {len(asked)} utterances, {total / RATE / 3600:.2f} hours")


if __name__ == "__main__":
    main()
