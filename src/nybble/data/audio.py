"""Folders of sound with transcripts: which files there are, what was said in each, and their samples.

=====================  ============================================================================================
beside the sounds      what was said
=====================  ============================================================================================
``transcripts.jsonl``  a line a file, ``{"audio": "a.wav", "text": ...}``; NeMo's ``audio_filepath`` is read as well
``metadata.csv``       columns ``file_name`` and ``transcription`` (or ``text``), as transformers' audio folders; or
                       LJSpeech's ``id|text|normalised text`` without a head line
``*.trans.txt``        in the folder or below: ``ID words``, as LibriSpeech has them
``a.txt``              of ``a.wav``, where there is none of the above
=====================  ============================================================================================

A folder without any of these is sound to calibrate on, but not to judge by. WAV files of whole numbers are read by the
standard library; everything else (FLAC, floats) needs the package ``soundfile``.
"""

from __future__ import annotations

import csv
import json
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nybble.core.errors import DataError, FileError
from nybble.data.files import read_utf8

ENDINGS = (".wav", ".flac", ".ogg")
AUDIO_KEYS, TEXT_KEYS = ("audio", "audio_filepath", "file_name", "file", "path"), ("text", "transcription", "sentence")


@dataclass(frozen=True)
class Recording:
    """A file, and what is said in it; None where nothing says so."""

    path: Path
    text: str | None


def recordings(src: str) -> list[Recording]:
    """The sounds of a folder, in the order of their names; where transcripts are listed, those that are.

    Raises:
        FileError: no folder. DataError: no sounds, or a transcript of a file that isn't there.
    """
    folder = Path(src).expanduser()
    if not folder.is_dir():
        raise FileError(f"data {src!r} is no folder. Give a folder of WAV files, with transcripts beside them.")
    for found in (_jsonl, _table, _librispeech):
        told = found(folder)
        if told:
            return [Recording(path, told[path]) for path in sorted(told)]
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    if not paths:
        raise DataError(f"{src!r} holds no sounds ({', '.join(ENDINGS)}), and no list of any.")
    texts = [path.with_suffix(".txt") for path in paths]
    return [
        Recording(path, read_utf8(str(text)).strip() if text.is_file() else None)
        for path, text in zip(paths, texts, strict=True)
    ]


def _jsonl(folder: Path) -> dict[Path, str]:
    place = folder / "transcripts.jsonl"
    if not place.is_file():
        return {}
    found: dict[Path, str] = {}
    for number, line in enumerate(read_utf8(str(place)).splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{place}, line {number} is no JSON: {error}.") from error
            found.update([_row(folder, row, f"{place}, line {number}")])
    return found


def _table(folder: Path) -> dict[Path, str]:
    place = folder / "metadata.csv"
    if not place.is_file():
        return {}
    lines = read_utf8(str(place)).splitlines()
    if lines and "|" in lines[0]:  # LJSpeech: no head, no quotes; the files may be in wavs/
        below = folder / "wavs" if (folder / "wavs").is_dir() else folder
        rows = [line.split("|") for line in lines if line.strip()]
        return dict(_placed(below, f"{row[0]}.wav", row[-1], f"{place}, line {i + 1}") for i, row in enumerate(rows))
    return dict(_row(folder, row, f"{place}, row {i + 1}") for i, row in enumerate(csv.DictReader(lines)))


def _row(folder: Path, row: object, place: str) -> tuple[Path, str]:
    """A file and its text, of a record with one of the usual names for each."""
    fields: Mapping[str, object] = row if isinstance(row, Mapping) else {}
    audio, text = (next((fields[k] for k in keys if k in fields), None) for keys in (AUDIO_KEYS, TEXT_KEYS))
    if not isinstance(audio, str) or not isinstance(text, str):
        raise DataError(
            f"{place} doesn't name a file ({', '.join(AUDIO_KEYS)}) and what is said in it ({', '.join(TEXT_KEYS)})."
        )
    return _placed(folder, audio, text, place)


def _placed(folder: Path, name: str, text: str, place: str) -> tuple[Path, str]:
    path = folder / name
    if not path.is_file():
        raise DataError(f"{place}: {path} does not exist. Take the line out, or bring the file.")
    return path, text.strip()


def _librispeech(folder: Path) -> dict[Path, str]:
    found = {}
    for place in sorted(folder.rglob("*.trans.txt")):
        for number, line in enumerate(read_utf8(str(place)).splitlines(), start=1):
            name, _, text = line.strip().partition(" ")
            if name:
                paths = [path for ending in ENDINGS if (path := place.parent / f"{name}{ending}").is_file()]
                if not paths:
                    raise DataError(f"{place}, line {number}: there is no sound {name} beside it.")
                found[paths[0]] = text
    return found


def read_sound(path: Path, rate: int) -> np.ndarray:
    """Samples of a file, float32 -1 .. 1 [samples]; channels are averaged.

    Args:
        path: a WAV file, or what ``soundfile`` reads.
        rate: samples a second that the model hears.

    Raises:
        FileError: it can't be read. DataError: another rate, or nothing in it; all name the file.
    """
    samples, found = _wave(path) if path.suffix.lower() == ".wav" else _soundfile(path, "it is no WAV file")
    if found != rate:
        raise DataError(
            f"{path} has {found} samples a second, and the model hears {rate}. Convert it first, say with: "
            f"ffmpeg -i {path.name} -ar {rate} OUT.wav."
        )
    if not samples.size:
        raise DataError(f"{path} holds no sound: it has no samples.")
    if not np.isfinite(samples).all():
        raise DataError(f"{path} holds NaN or infinity among its samples.")
    return samples


def _wave(path: Path) -> tuple[np.ndarray, int]:
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate, count = (
                file.getsampwidth(), file.getnchannels(), file.getframerate(), file.getnframes(),
            )  # fmt: skip
            content = file.readframes(count)
    except (wave.Error, EOFError) as error:
        if "unknown format" in str(error):
            return _soundfile(path, f"{error}; the standard library reads whole numbers alone")
        raise FileError(f"{path} is no WAV file that can be read: {str(error) or 'it ends too early'}.") from error
    except OSError as error:
        raise FileError(f"{path} can't be read: {error.strerror or error}.") from error
    if len(content) != count * width * channels:
        raise FileError(f"{path} is cut off: {len(content)} bytes of sound, and its header says {count} samples.")
    return _numbers(content, width).reshape(-1, channels).mean(1).astype(np.float32), rate


def _numbers(content: bytes, width: int) -> np.ndarray:
    """Of 8 bits (unsigned), 16, 24 or 32, little-endian, as float64 -1 .. 1."""
    if width == 1:
        return np.frombuffer(content, np.uint8) / 128.0 - 1
    wide = np.zeros((len(content) // width, 4), np.uint8)
    wide[:, 4 - width :] = np.frombuffer(content, np.uint8).reshape(-1, width)
    found: np.ndarray = wide.view("<i4")[:, 0] / 2.0**31
    return found


def _soundfile(path: Path, why: str) -> tuple[np.ndarray, int]:
    try:
        import soundfile  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise FileError(f"{path} can't be read ({why}): pip install soundfile, or convert it to 16-bit WAV.") from None
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise FileError(f"{path} can't be read as sound: {error}.") from error
    return samples.mean(1), int(rate)
