"""Files that appear whole or not at all, and a full disk as a plain message.

An output is written beside its place under the name ``NAME.partial``, flushed to the disk, then moved: a process
killed at any moment leaves the old file or the new one. The name is fixed, so the next try overwrites what a
killed one left; folders, and files that grow, are locked against a second writer. POSIX only.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from nybble.core.errors import FileError, UsageError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_BEHIND = 1 << 23
"""Bytes that are written before the system is told to move them to the disk."""
_DISK = {*_FULL, errno.EIO, errno.EROFS, errno.EFBIG}


_UNPUBLISHED: ContextVar[frozenset[Path]] = ContextVar("_UNPUBLISHED", default=frozenset())
"""Folders that are being written here, flush all that they hold before they appear, and are cleared if they don't."""


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


@contextmanager
def disk_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn an OSError inside into a FileError that names the file, and for a full disk the bytes needed.

    Args:
        path: the file being written or read.
        needed: size of the whole output in bytes, if known.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            size = "" if needed is None else f" {needed:,} bytes are needed for it."
            raise FileError(f"{path}: the disk is full.{size} Free some space or write to another disk.") from error
        raise FileError(f"{path}: {error.strerror or error}.") from error


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a move survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: Path | str, size: int | None = None) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes ``path`` when the block ends, and vanishes when the block raises.

    One writer at a time: two that write the same path at once share the temporary name. Within an :class:`AtomicFolder`
    that isn't resumable the flush is left to it: nobody sees the file before.

    Args:
        path: the file to make or replace; its folder must exist.
        size: bytes that will be written, for the message when the disk is full.

    Raises:
        FileError: any OSError, from the block as well as from opening, flushing and moving.
    """
    path = Path(path)
    partial = _partial(path)
    flushed = _UNPUBLISHED.get().isdisjoint(path.absolute().parents)
    with disk_errors(path, size):
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                if flushed:
                    os.fsync(file.fileno())
            partial.replace(path)
            if flushed:
                sync_folder(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


class WriteBehind:
    """Writes to a file whose bytes the system begins to move to the disk meanwhile, so that the flush takes less.

    Args:
        file: at its beginning; as :func:`atomic_file` yields it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._begin, self._end = file, 0, 0

    def seek(self, position: int) -> None:
        """Go on from ``position``, a little further on or anywhere."""
        if position != self._end:
            self._file.seek(position)
            near = self._end < position < self._begin + _BEHIND
            self._begin, self._end = self._begin if near else position, position

    def write(self, data: bytes | memoryview) -> None:
        """Write bytes."""
        self._file.write(data)
        self._end += memoryview(data).nbytes
        if self._end - self._begin >= _BEHIND and hasattr(os, "posix_fadvise"):
            self._file.flush()
            # Linux starts to write what isn't on the disk yet; on others it may do nothing.
            os.posix_fadvise(self._file.fileno(), self._begin, self._end - self._begin, os.POSIX_FADV_DONTNEED)
            self._begin = self._end


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all.

    Raises:
        FileError: the disk is full, or the folder is missing or can't be written.
    """
    with atomic_file(path, len(data)) as file:
        file.write(data)


def atomic_copy(source: Path | str, path: Path | str) -> None:
    """Write the bytes of ``source`` to ``path``, whole or not at all.

    Raises:
        FileError: ``source`` can't be read, the disk is full, or the folder is missing or can't be written.
    """
    source = Path(source)
    with disk_errors(source):
        file = source.open("rb")
    with file, atomic_file(path, source.stat().st_size) as copy:
        shutil.copyfileobj(file, copy)


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8 with its line ends as they are; see :func:`atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON in the order of its keys; NaN and infinity are refused with ValueError."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


_FILES = {".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".zip", ".json", ".html"}


def check_new_file(path: Path | str) -> None:
    """Refuse, before what takes long, a file that can't be written for want of its folder.

    Raises:
        FileError: there is no such folder, or the path is one itself.
    """
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{path} is a folder; name a file in it.")
    if not path.parent.is_dir():
        raise FileError(f"{path}: there is no folder {path.parent}; make it first.")


def check_new_folder(out: Path | str) -> None:
    """Refuse a place where no folder can appear, before anything is made.

    Raises:
        UsageError: no name, or that of a file. FileError: it exists.
    """
    if not isinstance(out, str | os.PathLike):
        raise UsageError(f"the output folder is a path; got a {type(out).__name__}.")
    if str(out).strip() in ("", "."):  # a Path makes one of the other
        raise UsageError("the output folder's name is empty, or '.', the folder we are in; give that of a new one.")
    if os.path.lexists(out):
        raise FileError(f"{out} exists already. Remove it or choose another output folder.")
    above = next((place for place in Path(out).absolute().parents if os.path.lexists(place)), None)
    if above is not None and not above.is_dir():
        raise FileError(f"{above} is a file, so {out} can't be in it. Choose another output folder.")
    if (suffix := Path(out).suffix.lower()) in _FILES:
        raise UsageError(f"{out} would be a folder with the name of a {suffix} file; give a name without {suffix}.")


def new_folder(out: Path | str, source: Path | str) -> Path:
    """The folder ``out`` that is to appear, without ``..``; refused where none can (:func:`check_new_folder`).

    Args:
        out: what is to appear.
        source: what it is made of, a path or a name that is none; links are followed.

    Raises:
        UsageError: they are one, or ``out`` would be in the folder ``source``. FileError: it exists.
    """
    if Path(source).exists():
        _check_apart(Path(out), Path(source))
    check_new_folder(out)
    found = Path(out)
    return found.resolve() if ".." in found.parts else found


def _check_apart(out: Path, source: Path) -> None:
    written, read = out.resolve(), source.resolve()
    if written == read:
        raise UsageError(f"{out} is the model itself, which stays as it is; choose a new output folder.")
    if read.is_dir() and read in written.parents:
        raise UsageError(f"{out} would be in the model's own folder, {source}; choose an output folder outside of it.")


def check_folder(folder: Path | str) -> None:
    """Raise FileError unless there is such a folder."""
    if not Path(folder).is_dir():
        raise FileError(f"{folder} is not a folder. Give the one that `nybble quantize` wrote.")


@contextmanager
def only_writer(out: Path, begun: Path) -> Iterator[None]:
    """Keep other processes from writing a file while the block runs.

    Args:
        out: the file.
        begun: what there is of it before it is whole; it is made, and if it holds nothing at the end, removed.

    Raises:
        FileError: another process is writing it, or the disk can't be written.
    """
    with disk_errors(begun):
        handle = os.open(begun, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _claim(handle, out, "file")
        try:
            yield
        finally:
            if begun.exists() and not begun.stat().st_size:
                begun.unlink()
    finally:
        os.close(handle)


def _claim(handle: int, out: Path, kind: str) -> None:
    """Lock what is open; the lock lives as long as the process: a killed run doesn't block the next."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileError(f"{out}: another process is writing it. Wait, or choose another {kind}.") from None


class AtomicFolder:
    """A folder that appears whole: write into the yielded ``OUT.partial``; it is moved to OUT on success.

    Args:
        out: the folder to make. One that exists is refused, never replaced.
        resumable: keep what a killed or failed run left in ``OUT.partial``, and leave it there if this one fails
            too. Otherwise it is cleared at the start and removed on failure.

    Raises:
        FileError: OUT exists, another process is writing it, or the disk can't be written.
    """

    def __init__(self, out: Path | str, *, resumable: bool = False) -> None:
        self.out = Path(out)
        self.partial = _partial(self.out)
        self.resumable = resumable
        self._lock = -1

    def __enter__(self) -> Path:
        """Claim ``OUT.partial`` and return it."""
        check_new_folder(self.out)
        with disk_errors(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.partial, os.O_RDONLY | os.O_DIRECTORY)
            try:
                _claim(self._lock, self.out, "folder")
                if not self.resumable:
                    self._clear()
            except BaseException:
                self._release()
                raise
        if not self.resumable:
            _UNPUBLISHED.set(_UNPUBLISHED.get() | {self.partial.absolute()})
        return self.partial

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Move the folder into place, or clean up after a failure."""
        _UNPUBLISHED.set(_UNPUBLISHED.get() - {self.partial.absolute()})
        try:
            if kind is None:
                self._publish()
            elif isinstance(error, OSError) and error.errno in _DISK:  # from a library that wrote into the folder
                with disk_errors(self.out):
                    raise error
        finally:
            if not self.resumable:
                shutil.rmtree(self.partial, ignore_errors=True)
            self._release()

    def _clear(self) -> None:
        for child in self.partial.iterdir():
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()

    def _publish(self) -> None:
        with disk_errors(self.out):
            for folder, _, names in os.walk(self.partial):
                for name in names:
                    with (Path(folder) / name).open("rb") as file:
                        os.fsync(file.fileno())
                sync_folder(Path(folder))
            if os.path.lexists(self.out):  # a rename would replace an empty folder silently
                raise FileError(f"{self.out} appeared while it was being written. Choose another output folder.")
            self.partial.rename(self.out)
            try:
                sync_folder(self.out.parent)
            except OSError:
                self.out.rename(self.partial)  # an error means that it isn't there
                raise

    def _release(self) -> None:
        os.close(self._lock)
        self._lock = -1


def free_bytes(path: Path | str) -> int:
    """Bytes that this user can still write on the disk of ``path``, which needn't exist yet."""
    path = Path(path).absolute()
    with disk_errors(path):
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free


def need_space(path: Path | str, needed: int) -> None:
    """Raise FileError, naming both numbers, if fewer than ``needed`` bytes are free where ``path`` will be.

    What an earlier run left in ``PATH.partial`` counts as free: it is a part of what is needed, or is cleared.
    """
    free = free_bytes(path) + _bytes_in(_partial(Path(path)))
    if free < needed:
        raise FileError(
            f"{path}: {needed:,} bytes are needed but {free:,} are free. Free some space or write to another disk."
        )


def _bytes_in(folder: Path) -> int:
    with disk_errors(folder):
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sha256_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal; the file is streamed.

    Raises:
        FileError: the file can't be read.
    """
    with disk_errors(Path(path)), Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
