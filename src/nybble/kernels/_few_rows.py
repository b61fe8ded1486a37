"""The CUDA C++ kernels for a few rows of x: compiled for a kind of weight at its first use, where there is an nvcc."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
import warnings
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.kernels._gpu_weights import E8M0, PLAIN, Weight
from nybble.kernels._library import cache_folder

ROWS = 64
"""Of x, that one pass over the codes serves."""
SOURCE = Path(__file__).parent / "_native" / "few_rows.cu"
SHAPES = {1: (24, 1), 2: (16, 1), 4: (16, 1), 8: (12, 1)}
"""For 8 times as many rows of x: warps of a block, blocks of a multiprocessor (measured on an H100)."""
_WIDE = 128
_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CODES, _CODES_BY_BLOCKS = 3, 4
_NONE = 30


FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC")
_LIMIT_S = 600
Shapes = tuple[tuple[int, int], ...]
Made = tuple[Any, dict[int, tuple[int, int]]]
"""A function, and its shapes."""


class _Args(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "codes", "table", "scales", "scale_table", "outer", "zeros", "x", "bias", "out")),
        *((name, ctypes.c_int32) for name in (
            "n", "k", "m", "across", "group_log", "share_log", "outer_log", "tiles", "parts")),
        ("add", ctypes.c_void_p),
    )  # fmt: skip


Kind = tuple[int, bool, int, bool, bool, bool]
"""What a kernel is compiled for: bits, bfloat16 or not, how scales are stored, PRE, ZERO, HALVES."""


def kind_of(weight: Weight, dtype: torch.dtype, rows: int) -> Kind | str:
    """What has to be compiled for a weight and a number of rows of x; or why the kernels don't read it."""
    scales = weight.scales
    if weight.bits not in (2, 3, 4) or weight.k % 32 or weight.offset is not None:
        return "codes that aren't 2 to 4 bits in rows of whole 32, or offsets"
    if dtype not in (torch.bfloat16, torch.float16) or (dtype == torch.float16 and scales.how == E8M0):
        return f"x in {dtype}"
    if weight.zero is not None and weight.zero.dtype != torch.int8:
        return "zero points that aren't whole"
    group = 1 << _NONE if weight.across == 1 else weight.group
    outer_block = scales.outer_block if scales.outers == 2 else 1
    if group < 16 or any(_log(size) is None for size in (group, weight.share, outer_block)):
        return f"blocks of {weight.group} columns and {weight.share} rows"
    if scales.how == PLAIN:
        stored = _FLOATS[scales.values.dtype]
    else:
        stored = _CODES_BY_BLOCKS if scales.outers == 2 or scales.add is not None else _CODES
    pre = group % _WIDE != 0 or rows > 16
    return weight.bits, dtype == torch.bfloat16, stored, pre, weight.zero is not None, group < 32


def _log(size: int) -> int | None:
    return None if size & (size - 1) else size.bit_length() - 1


def library(kind: Kind, shapes: Shapes | None = None) -> Made | None:
    """What is compiled for a kind of weight and the current device; None, with one warning, where that can't be."""
    nvcc = compiler()
    if nvcc is None or torch.cuda.get_device_capability() < (8, 0):
        return None
    return _library(kind, shapes or tuple(SHAPES.values()), "{}{}".format(*torch.cuda.get_device_capability()), nvcc)


@cache
def compiler() -> str | None:
    """Path of an nvcc: that of the CUDA that torch's builder finds."""
    from torch.utils.cpp_extension import CUDA_HOME

    return None if CUDA_HOME is None else shutil.which("nvcc", path=str(Path(CUDA_HOME) / "bin"))


@lru_cache(maxsize=256)
def _library(kind: Kind, shapes: Shapes, arch: str, nvcc: str) -> Made | None:
    try:
        return _opened(build(kind, shapes, arch, nvcc)), dict(zip(SHAPES, shapes, strict=True))
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"CUDA kernels that can't be compiled ({error}): Triton's are taken, which take longer.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def build(kind: Kind, shapes: Shapes, arch: str, nvcc: str) -> Path:
    """Compile into the user's cache, where nobody has yet; the file appears there whole or not at all.

    Raises:
        OSError: the compiler fails; has the end of what it says.
    """
    flags = [*FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", *defines(kind, shapes)]
    digest = hashlib.sha256(" ".join([nvcc, *flags]).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    target = cache_folder() / f"few_rows-{digest}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as room:
            made = Path(room) / "few_rows.so"
            command = [nvcc, *flags, "-o", str(made), str(SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
            if done.returncode:
                raise OSError(f"{nvcc} failed: {done.stderr.strip()[-300:]}")
            made.replace(target)
    return target


def defines(kind: Kind, shapes: Shapes) -> list[str]:
    """What the source is told."""
    names = ("BITS", "BRAIN", "SCALE", "PRE", "ZERO", "HALVES")
    found = [f"-D{name}={int(value)}" for name, value in zip(names, kind, strict=True)]
    for of, (warps, blocks) in zip(SHAPES, shapes, strict=True):
        found += [f"-DWARPS_{of}={warps}", f"-DBLOCKS_{of}={blocks}"]
    return found


def _opened(path: Path) -> Any:
    run = ctypes.CDLL(str(path)).nybble_few_rows
    run.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    run.restype = ctypes.c_int
    return run


def multiply(made: Made, x: Tensor, weight: Weight, bias: Tensor | None, outer: Tensor | None = None) -> Tensor:
    """X [m, k] W^T + bias for m up to :data:`ROWS`; ``made`` is the library of its kind.

    With ``outer``, float32 [1], that is what scales in codes are multiplied with.
    """
    m, n = x.shape[0], weight.n
    out = x.new_empty(m, n)
    of = 1 << max(0, (-(-m // 8) - 1).bit_length())
    run, shapes = made
    key = (m, *shapes[of])
    if key not in weight.kept:
        warps, per = shapes[of]
        weight.kept[key] = _args(x, weight, bias, out, warps, per * _processors(x.device.index or 0))
    kept, blocks = weight.kept[key]
    args = _Args.from_buffer_copy(kept)
    args.x, args.bias, args.out = x.data_ptr(), _pointer(bias), out.data_ptr()
    if outer is not None:
        args.outer = outer.data_ptr()
    failed = run(ctypes.addressof(args), of, blocks, _stream(x.get_device()))
    if failed:
        raise RuntimeError(f"packed_linear: CUDA error {failed} in a product with a weight {[n, weight.k]}.")
    return out


def _stream(device: int) -> int:
    """Address of the current stream: that of ``torch.cuda.current_stream``, in a tenth of its time."""
    found: int = torch._C._cuda_getCurrentRawStream(device)
    return found


def _args(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor, warps: int, blocks: int) -> tuple[_Args, int]:
    """What the kernel gets, and blocks of threads: each has as many tiles of 16 rows as the next, or one more."""
    scales, tiles = weight.scales, -(-weight.n // 16)
    blocks = min(blocks, tiles)
    here = min(warps, -(-tiles // blocks))
    parts = min(warps // here, -(-weight.k // _WIDE))
    outer_log = _NONE if scales.outers < 2 else _log(scales.outer_block)
    args = _Args(
        codes=weight.codes.data_ptr(), table=weight.table.data_ptr(), scales=scales.values.data_ptr(),
        scale_table=_pointer(scales.table), outer=_pointer(scales.outer), zeros=_pointer(weight.zero),
        x=x.data_ptr(), bias=_pointer(bias), out=out.data_ptr(), n=weight.n, k=weight.k, m=x.shape[0],
        across=weight.across, group_log=_NONE if weight.across == 1 else _log(weight.group),
        share_log=_log(weight.share), outer_log=outer_log, tiles=here, parts=parts, add=_pointer(scales.add),
    )  # fmt: skip
    return args, blocks


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=64)
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
