"""The compiled part of the CPU kernels: found, or built once where there is a C++ compiler; loaded by ctypes.

``_native/*.cpp`` needs nothing but a compiler: no header of Python or torch, so that one build serves every version of
both. Its files are compiled side by side, as many as there are processors. The library is looked for beside its source
(where installing built it), then in the user's cache; the file's name holds a hash of the source. Which instructions a
processor has is asked when it runs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parent / "_native"
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off",
)  # fmt: skip
_COMPILERS = ("c++", "g++", "clang++")
_LIMIT_S = 600


def file_name() -> str:
    """Of the library that belongs to this source, compiler's flags and kind of machine."""
    digest = hashlib.sha256(" ".join((*FLAGS, platform.machine(), platform.system())).encode())
    for path in sorted(SOURCE.glob("*.cpp")) + sorted(SOURCE.glob("*.inc")):
        digest.update(path.read_bytes())
    return f"packed-{digest.hexdigest()[:16]}.so"


def cache_folder() -> Path:
    """Where what is built at the first use is kept.

    Raises:
        OSError: a user without a home directory, as in some containers, and no XDG_CACHE_HOME.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nybble" / "kernels"
    except RuntimeError as error:
        raise OSError(f"nowhere to keep what is built (XDG_CACHE_HOME would say where): {error}") from error


def build(folder: Path) -> Path:
    """Compile into ``folder``; the file appears there whole or not at all.

    Raises:
        OSError: no compiler; or it fails, with the end of what it says.
    """
    compiler = next(
        (found for name in (os.environ.get("CXX"), *_COMPILERS) if name and (found := shutil.which(name))), ""
    )
    if not compiler:
        raise OSError("no C++ compiler (c++, g++, clang++ or what CXX names)")
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(SOURCE.glob("*.cpp"), key=lambda path: -path.stat().st_size)
    with tempfile.TemporaryDirectory(dir=folder) as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        room = Path(name)
        objects = {source: str(room / f"{source.stem}.o") for source in sources}
        jobs = [pool.submit(_run, compiler, *FLAGS, "-c", str(at), "-o", to) for at, to in objects.items()]
        try:
            for job in jobs:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)
        _run(compiler, "-shared", "-o", str(room / "packed.so"), *objects.values())
        target = folder / file_name()
        (room / "packed.so").replace(target)
    return target


def _run(compiler: str, *given: str) -> None:
    try:
        done = subprocess.run([compiler, *given], capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{compiler} took more than {_LIMIT_S} s") from error
    if done.returncode:
        raise OSError(f"{compiler} failed: {done.stderr.strip()[-300:]}")


@cache
def library() -> ctypes.CDLL | None:
    """The library; None, with one warning, where there is none and none can be built."""
    name = file_name()
    failed = []
    for built in (True, False):
        try:
            place = (SOURCE if built else cache_folder()) / name
            if place.is_file():
                return _opened(place)
        except (OSError, AttributeError) as error:
            failed.append(f"{name}: {error}")
    try:
        return _opened(build(cache_folder()))
    except (OSError, AttributeError) as error:
        failed.append(str(error))
    warnings.warn(
        f"the compiled CPU kernels aren't there ({'; '.join(failed)}): torch looks packed weights up before they are "
        "multiplied with, which takes longer than float weights do; the numbers are the same. A C++ compiler mends it; "
        "nybble.load(folder, dense=True) keeps unpacked copies.",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def _opened(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    found.nybble_isa.restype = found.nybble_prepare.restype = found.nybble_run.restype = ctypes.c_int
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.nybble_prepare.argtypes = (pointer,)
    found.nybble_set.restype, found.nybble_set.argtypes = ctypes.c_int, (pointer, number)
    found.nybble_run.argtypes = (
        pointer, pointer, number, number, pointer, pointer, number, number, number, number, number, pointer,
    )  # fmt: skip
    found.nybble_rows.restype = found.nybble_round.restype = ctypes.c_int
    found.nybble_rows.argtypes = (pointer, pointer, number, pointer, number, number)
    found.nybble_round.argtypes = (pointer, pointer, number, number, pointer, number, number, pointer)
    found.nybble_decode.restype = ctypes.c_int
    found.nybble_decode.argtypes = (pointer, pointer, number, number, number, number, number, pointer)
    found.nybble_step.restype, found.nybble_step.argtypes = ctypes.c_int, (pointer, number, number, pointer)
    found.nybble_draw.restype = None
    found.nybble_draw.argtypes = (pointer, pointer, pointer, number, number, number, pointer)
    found.nybble_whole_isa.restype = found.nybble_whole_knows.restype = found.nybble_whole.restype = ctypes.c_int
    found.nybble_whole_knows.argtypes = (pointer, number)
    found.nybble_whole.argtypes = (
        pointer, number, pointer, pointer, number, number, pointer, pointer, number, number, number, pointer,
    )  # fmt: skip
    return found


@cache
def team() -> int | None:
    """Address of ``GOMP_parallel`` of the OpenMP that torch has loaded, so that both use the same threads; or None."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except AttributeError:
        return None
