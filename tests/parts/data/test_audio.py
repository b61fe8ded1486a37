"""Folders of sounds and transcripts: every layout, every width, and what is refused by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from tests.speech import save_speech, save_wav, tone

from nybble.core.errors import DataError, FileError, NybbleError
from nybble.data.audio import read_sound, recordings


@pytest.mark.parametrize(("width", "step"), [(1, 1 / 127), (2, 2**-15), (3, 2**-23), (4, 1e-7)])
def test_all_widths_are_read(tmp_path: Path, width: int, step: float) -> None:
    sound = np.stack([tone(1), tone(1) / 2], 1)
    found = read_sound(save_wav(tmp_path / "a.wav", sound, width=width), 16000)
    assert found.dtype == np.float32 and found.shape == (len(sound),)
    assert np.abs(found - sound.mean(1)).max() < 1.5 * step


def folder(tmp_path: Path, layout: str) -> Path:
    for name in ("b", "a", "other"):
        save_wav(tmp_path / ("wavs" if layout == "ljspeech" else "") / f"{name}.wav", tone(1))
    texts = {"a": "Well, one", "b": "two | three"}
    if layout == "txt":
        for name, text in texts.items():
            (tmp_path / f"{name}.txt").write_text(text + "\n")
        (tmp_path / "other.wav").unlink()
    elif layout == "librispeech":
        (tmp_path / "x.trans.txt").write_text("".join(f"{name} {text}\n" for name, text in texts.items()))
    elif layout == "ljspeech":
        (tmp_path / "metadata.csv").write_text("a|Wl 1|Well, one\nb|2|two \n")
    elif layout == "csv":
        rows = "".join(f'{name}.wav,"{text}"\n' for name, text in texts.items())
        (tmp_path / "metadata.csv").write_text("file_name,transcription\n" + rows.replace("|", "/"))
    else:
        key = "audio_filepath" if layout == "nemo" else "audio"
        rows = "".join(json.dumps({key: f"{name}.wav", "text": text}) + "\n" for name, text in texts.items())
        (tmp_path / "transcripts.jsonl").write_text(rows)
    return tmp_path


@pytest.mark.parametrize("layout", ["txt", "librispeech", "ljspeech", "csv", "jsonl", "nemo"])
def test_all_layouts_say_the_same(tmp_path: Path, layout: str) -> None:
    found = recordings(str(folder(tmp_path, layout)))
    assert [each.path.name for each in found] == ["a.wav", "b.wav"] and found[0].text == "Well, one"
    assert found[1].text is not None and found[1].text.startswith("two")


def test_sounds_without_transcripts_are_known_as_such(tmp_path: Path) -> None:
    save_speech(tmp_path, 2)
    (tmp_path / "1.txt").unlink()
    assert [each.text for each in recordings(str(tmp_path))] == ["one seven", None]


def float_wav(path: Path) -> None:
    """A WAV of float32, which the standard library doesn't read."""
    data = np.zeros(8, "<f4").tobytes()
    form = struct.pack("<HHIIHH", 3, 1, 16000, 64000, 4, 32)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)


def broken(path: Path, how: str) -> None:
    save_wav(path, tone(0), 8000 if how == "rate" else 16000)
    if how == "no sound":
        save_wav(path, np.zeros(0))
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif how == "no wave":
        path.write_bytes(b"ID3 something else")
    elif how == "float":
        float_wav(path)
    elif how == "flac":
        path.rename(path.with_suffix(".flac"))


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("rate", DataError, r"a\.wav has 8000 samples a second, and the model hears 16000"),
        ("no sound", DataError, r"a\.wav holds no sound"),
        ("cut", FileError, r"a\.wav is cut off: 956 bytes"),
        ("no wave", FileError, r"a\.wav is no WAV file that can be read"),
        ("float", FileError, r"a\.wav can't be read .*pip install soundfile"),
        ("flac", FileError, r"a\.flac can't be read .*pip install soundfile"),
        ("missing", FileError, r"a\.wav can't be read: No such file"),
    ],
)
def test_bad_sounds_are_named(tmp_path: Path, how: str, kind: type[NybbleError], message: str) -> None:
    place = tmp_path / "a.wav"
    if how != "missing":
        broken(place, how)
    place = place.with_suffix(".flac") if how == "flac" else place
    with pytest.raises(kind, match=message):
        read_sound(place, 16000)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no sounds"),
        ({"transcripts.jsonl": '{"audio": "no.wav", "text": "a"}'}, r"line 1: .*no\.wav does not exist"),
        ({"transcripts.jsonl": '{"audio": "no.wav"}'}, "line 1 doesn't name a file"),
        ({"transcripts.jsonl": "{"}, "line 1 is no JSON"),
        ({"metadata.csv": "a,b\n1,2\n"}, "row 1 doesn't name a file"),
        ({"x.trans.txt": "A-1 WORDS\n"}, "line 1: there is no sound A-1"),
    ],
)
def test_lists_that_do_not_fit_are_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        recordings(str(tmp_path))
    with pytest.raises(FileError, match="is no folder"):
        recordings(str(tmp_path / "nothing"))
