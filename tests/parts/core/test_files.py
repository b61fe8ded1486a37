from __future__ import annotations

import errno
import hashlib
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
