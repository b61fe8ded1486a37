from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from nybble.core import files
from nybble.core.errors import FileError
from nybble.core.files import AtomicFolder, atomic_file, atomic_write_bytes, atomic_write_json, atomic_write_text


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_made_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    for data in (b"first", b"2nd", b""):
        atomic_write_bytes(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["x.bin"]


def test_text_keeps_its_line_ends_and_is_utf8(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "x", "ä\r\n\n")
    assert (tmp_path / "x").read_bytes() == b"\xc3\xa4\r\n\n"


def test_json_is_readable_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    atomic_write_json(path, {"b": [1, 2.5, None], "a": "ä"})
    assert json.loads(path.read_text()) == {"b": [1, 2.5, None], "a": "ä"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic_write_json(path, float("nan"))
    assert json.loads(path.read_text())["a"] == "ä"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_names_file_and_bytes_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "model.bin"
    atomic_write_bytes(path, b"old")
    monkeypatch.setattr(*(os, "fsync", _full) if step == "fsync" else (Path, "replace", _full))
    with pytest.raises(FileError, match=r"model\.bin: the disk is full\. 12,345 bytes are needed for it\. Free some"):
        atomic_write_bytes(path, bytes(12345))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.bin"]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full, a Linux device without space")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    (tmp_path / "x.partial").symlink_to("/dev/full")
    with pytest.raises(FileError, match=r"x: the disk is full\. 3 bytes"):
        atomic_write_bytes(tmp_path / "x", b"abc")
    assert os.listdir(tmp_path) == []
    assert Path("/dev/full").is_char_device()


def test_other_disk_errors_are_file_errors_too(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"missing/x: No such file or directory"):
        atomic_write_bytes(tmp_path / "missing" / "x", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="folder: Is a directory"):
        atomic_write_bytes(tmp_path / "folder", b"")
    assert os.listdir(tmp_path) == ["folder"]


def test_an_interrupt_leaves_the_old_file(tmp_path: Path) -> None:
    atomic_write_bytes(tmp_path / "x", b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "x") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def _killed(code: str, *args: Path) -> None:
    """Run ``code``, which stops half-way by SIGKILL."""
    code = "import os, sys\nfrom nybble.core.files import *\n" + code
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], check=False)
    assert done.returncode == -signal.SIGKILL


def test_a_kill_between_writes_leaves_the_old_file_and_the_next_try_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "x"
    atomic_write_bytes(path, b"old")
    _killed("with atomic_file(sys.argv[1]) as f: f.write(b'half'); f.flush(); os.kill(os.getpid(), 9)", path)
    assert path.read_bytes() == b"old"
    assert (tmp_path / "x.partial").read_bytes() == b"half"
    atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "made" / "out"
    with AtomicFolder(out) as folder:
        assert folder == tmp_path / "made" / "out.partial"
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("1")
        assert not out.exists()
    assert (out / "sub" / "x").read_text() == "1"
    assert os.listdir(tmp_path / "made") == ["out"]


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_an_output_that_exists_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "out")
    with pytest.raises(FileError, match=r"out exists already\. Remove it or choose another output folder"):
        AtomicFolder(tmp_path / "out").__enter__()
    assert os.listdir(tmp_path) == ["out"]


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="appeared while"), AtomicFolder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert os.listdir(tmp_path) == ["out"]


def test_a_failed_folder_vanishes_or_is_resumed(tmp_path: Path) -> None:
    for resumable in (False, True):
        with pytest.raises(KeyError), AtomicFolder(tmp_path / "out", resumable=resumable) as folder:
            (folder / "x").touch()
            raise KeyError
        assert os.listdir(tmp_path) == (["out.partial"] if resumable else [])
    with AtomicFolder(tmp_path / "out", resumable=True) as folder:
        assert (folder / "x").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    code = "with AtomicFolder(sys.argv[1]) as f: (f / 'sub').mkdir(); (f / 'x').touch(); os.kill(os.getpid(), 9)"
    _killed(code, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out.partial")) == ["sub", "x"]
    with AtomicFolder(tmp_path / "out") as folder:
        (folder / "y").touch()
    assert os.listdir(tmp_path / "out") == ["y"]


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    with AtomicFolder(tmp_path / "out") as folder:
        (folder / "x").touch()
        with pytest.raises(FileError, match="another process is writing it"):
            AtomicFolder(tmp_path / "out").__enter__()
    assert os.listdir(tmp_path / "out") == ["x"]


def test_a_broken_disk_inside_a_folder_too(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="out: Input/output error"), AtomicFolder(tmp_path / "out"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_inside_a_folder_is_a_file_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="out: the disk is full"), AtomicFolder(tmp_path / "out"):
        _full()
    assert os.listdir(tmp_path) == []


def test_other_errors_inside_a_folder_keep_their_class(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError), AtomicFolder(tmp_path / "out"):
        raise ConnectionError


@pytest.mark.parametrize("place", ["", "not/yet/there"])
def test_space_is_asked_for_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    asked: list[Path] = []

    def disk_usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=1234)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    assert files.free_bytes(tmp_path / place) == 1234
    files.need_space(tmp_path / place, 1234)
    with pytest.raises(FileError, match="1,235 bytes are needed but 1,234 are free"):
        files.need_space(tmp_path / place, 1235)
    assert set(asked) == {tmp_path}


def test_sha256_of_a_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(data)
    assert files.sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()
    with pytest.raises(FileError, match="y: No such file"):
        files.sha256_file(tmp_path / "y")


@pytest.mark.parametrize("resumable", [False, True])
def test_what_is_in_a_new_folder_is_flushed_before_it_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumable: bool
) -> None:
    """Once each, unless a killed run is to be gone on from: then when a file is written, too."""
    out, flushed, real = tmp_path / "out", list[str](), os.fsync

    def fsync(handle: int) -> None:
        flushed.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        assert not (out.exists() and f"{out.name}.partial" in flushed[-1])
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with AtomicFolder(out, resumable=resumable) as folder:
        (folder / "in").mkdir()
        for name in ("a", "in/b"):
            atomic_write_bytes(folder / name, b"x")
        inside = len(flushed)
    names = [str(tmp_path / "out.partial" / name) for name in ("", "a", "in", "in/b")]
    assert {name.rstrip("/") for name in names} <= set(flushed[inside:]) and flushed[-1] == str(tmp_path)
    assert inside == (4 if resumable else 0)  # each file, and the folder that it is in
    atomic_write_bytes(tmp_path / "alone", b"x")
    assert flushed[-2:] == [str(tmp_path / "alone.partial"), str(tmp_path)]


def test_a_file_that_is_flushed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes, whatever is skipped; the system is told of each byte at most once."""
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(files, "_BEHIND", 100)
    monkeypatch.setattr(os, "posix_fadvise", lambda _, begin, count, __: told.append((begin, begin + count)))
    path, whole = tmp_path / "x", bytearray(2000)
    with path.open("wb") as file:
        behind = files.WriteBehind(file)
        for begin, count in ((0, 60), (60, 60), (130, 80), (1000, 50), (400, 300)):
            behind.seek(begin)
            data = bytes([begin % 251 + 1]) * count
            behind.write(memoryview(data))
            whole[begin : begin + count] = data
    assert path.read_bytes() == bytes(whole[:1050])
    assert told == [(0, 120), (400, 700)] and all(a[1] <= b[0] for a, b in itertools.pairwise(told))
