"""What comes of opening damaged files, and what must never come of it."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from nybble.core.errors import NybbleError

SLOW = 2.0  # seconds of the process
HANGS = 20  # seconds on the clock, on a machine that does other things too
GROWTH = 64 << 20  # bytes of peak memory that one trial may add; the files have less than 1 MiB
ROOM = 1 << 30  # bytes of address space beyond what there is before
_opened: list[str] = []
_watching: list[str] = []


class FaultError(AssertionError):
    """What nybble must not do: another error than its own, waiting, taking memory, looking elsewhere."""


def read(path: Path, depth: int) -> str:
    """Open a model and decode its tensors, and say in a word what came of it.

    Args:
        path: a folder or a file.
        depth: 0: of what another library quantized those that are packed, whatever the model is; 1: all of the model;
            2: build and inspect it too.

    Raises:
        FaultError: what must not be.
    """
    began, peak = time.process_time(), _peak()
    _opened.clear()
    _watching[:] = [str(path if path.is_dir() else path.parent)]
    try:
        outcome = _outcome(path, depth)
    finally:
        _watching.clear()
    spent = time.process_time() - began
    if spent > SLOW:
        raise FaultError(f"took {spent:.1f} s")
    if _peak() - peak > GROWTH:
        raise FaultError(f"took {(_peak() - peak) >> 20} MiB")
    if _opened:
        raise FaultError(f"opened {_opened[0]}")
    return outcome


def _outcome(path: Path, depth: int) -> str:
    from nybble.checkpoint.account import inspect
    from nybble.checkpoint.marked import is_quantized
    from nybble.models.sources.open import open_source
    from nybble.pipelines.load import load_with_origin

    try:
        own = path.is_dir() and is_quantized(path)
        source: Any = None if own else open_source(str(path))
        packed = getattr(source, "packed", {})
        if depth == 0 and packed:
            for weight in packed.values():
                _shaped(weight.name, weight.values(source._file_tensor), weight.shape)
        elif not own:
            assert isinstance(source.note, str)
            for name, tensor in source.load(source.tensor_names()).items():
                _shaped(name, tensor, source.stored()[source.ties().get(name, name)].shape)
        if own or depth > 1:
            load_with_origin(path)
            if path.is_dir() and (own or packed):
                inspect(path)
    except NybbleError as error:
        return _refused(error)
    except FaultError:
        raise
    except BaseException as error:
        where = "".join(traceback.format_exception(error)[-6:])
        raise FaultError(f"{type(error).__name__} escaped: {where}") from error
    return "read"


def _shaped(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise FaultError(f"{name} is {list(tensor.shape)}; it was said to be {list(shape)}")


def _refused(error: NybbleError) -> str:
    """The error's class; where another library's parser said no, or a check of nybble's own is missing, "wrapped"."""
    text = str(error)
    if not 15 < len(text) < 5000:
        raise FaultError(f"a message of {len(text)} characters: {text[:200]}")
    cause: BaseException | None = error
    foreign, seen = False, set[int]()
    while cause is not None:
        if id(cause) in seen:
            raise FaultError(f"an error that is its own cause: {text[:200]}")
        seen.add(id(cause))
        said = str(cause).lower()
        if isinstance(cause, MemoryError) or "not enough memory" in said or "can't allocate" in said:
            raise FaultError(f"asked for memory that isn't there: {said[:300]}")
        foreign |= not isinstance(cause, NybbleError)
        cause = cause.__cause__
    return f"{type(error).__name__}{' (of another error)' if foreign else ''}"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _audit(event: str, args: tuple[Any, ...]) -> None:
    """Notes what is opened outside the model's place; Python's own modules may be."""
    if not _watching:
        return
    if event in ("socket.connect", "subprocess.Popen", "os.system", "os.exec"):
        _opened.append(f"{event} {args!r:.200}")
    if event == "open" and isinstance(args[0], str | bytes):
        name = os.path.realpath(os.fsdecode(args[0]))
        inside = name.startswith((os.path.realpath(_watching[0]), *_LIBRARIES))
        if not inside:
            _opened.append(name)


_LIBRARIES = tuple({os.path.realpath(p) for p in (*sys.path, sys.prefix, sys.base_prefix) if p} | {"/proc/", "/sys/"})


@contextmanager
def watched(trial: list[str]) -> Iterator[None]:
    """Limits for a run of trials: of memory, of time; ``trial[0]`` is named where one hangs."""
    torch.set_num_threads(1)

    def hangs(signum: int, frame: FrameType | None) -> None:
        print(f"{trial[0]} hangs", file=sys.stderr)
        traceback.print_stack(frame)
        os._exit(3)

    def forbidden(*_: Any, **__: Any) -> None:
        raise FaultError("a pickle was about to be loaded")

    sys.addaudithook(_audit)
    before, loaded = resource.getrlimit(resource.RLIMIT_AS), torch.load
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    signal.signal(signal.SIGALRM, hangs)
    torch.load = forbidden
    try:
        yield
    finally:
        torch.load = loaded
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
