"""gcc: whether it is there, and what it makes of an exported folder."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nybble.core.errors import DataError, UsageError

NEEDED = 12
"""The first gcc that has ``_Float16`` on x86-64, and ``-fexcess-precision=16`` for it."""
SECONDS = 600


def find_compiler(name: str = "gcc") -> str:
    """The path of gcc, and make beside it.

    Raises:
        UsageError: one of them isn't installed, or gcc is too old.
    """
    for tool in (name, "make"):
        if shutil.which(tool) is None:
            raise UsageError(
                f"{tool} isn't on the path, which compiles the exported C; `apt-get install gcc make` brings both. "
                "Without --check nothing is compiled here."
            )
    found = version(name)
    if int(found.partition(".")[0]) < NEEDED:
        raise UsageError(f"{name} {found} is too old; _Float16 on x86-64 without AVX512-FP16 needs gcc {NEEDED}.")
    return str(shutil.which(name))


def version(name: str = "gcc") -> str:
    """The version of gcc: ``12.2.0``."""
    done = subprocess.run([name, "-dumpfullversion"], capture_output=True, text=True, check=False, timeout=SECONDS)
    return done.stdout.strip() or "0"


def make(folder: Path, target: str = "all", **variables: int | str) -> str:
    """What ``make TARGET NAME=VALUE ...`` prints.

    Args:
        folder: what :func:`nybble.microcontroller.project.write_project` wrote.
        target: of the Makefile.
        variables: in capitals: LANES, UNROLL, CORES, FUSED, OPT.

    Raises:
        UsageError: no compiler. DataError: it failed; the message has its last lines.
    """
    find_compiler()
    words = [f"{name}={value}" for name, value in variables.items()]
    done = subprocess.run(
        ["make", "-s", target, *words], cwd=folder, capture_output=True, text=True, check=False, timeout=SECONDS
    )
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-4:]
        raise DataError(f"make {target} {' '.join(words)} failed: {' / '.join(last)}")
    return done.stdout


def built(folder: Path, name: str, variables: Mapping[str, int | str]) -> Path:
    """Where the Makefile puts a program or library that was built with these variables, absent ones as in config.mk."""
    said = dict(
        line.replace("?", "").split(" = ", 1)
        for line in (folder / "config.mk").read_text(encoding="utf-8").splitlines()
        if " = " in line.replace("?", "")
    )
    said = {key.strip(): value.strip() for key, value in said.items()} | {k: str(v) for k, v in variables.items()}
    numbers = [said[key] for key in ("TYPE", "LANES", "UNROLL", "CORES", "FUSED")]
    return folder / "build" / "t{}-l{}-u{}-c{}-f{}".format(*numbers) / name


class Library:
    """An exported step, called from Python: training as the device does it, at the speed of C.

    Args:
        folder: what was exported; it is compiled there.
        dtype: of the export.
        outputs: numbers that come out.
        variables: as for :func:`make`.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, outputs: int, **variables: int | str) -> None:
        make(folder, "library", **variables)
        self._c = ctypes.CDLL(str(built(folder, "libtrain.so", variables).absolute()))
        self._c.net_forward.restype = self._c.net_data.restype = ctypes.c_void_p
        self._c.net_step.restype = ctypes.c_float
        self._c.net_data.argtypes = [ctypes.c_char_p]
        self._c.net_forward.argtypes = [ctypes.c_void_p]
        self._c.net_step.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_float]
        self._dtype, self._outputs = dtype, outputs
        self._c.net_init()

    def forward(self, x: Tensor) -> Tensor:
        """One sample -> ``[outputs]``, in float32."""
        given = x.to(self._dtype).contiguous()
        return self._read(self._c.net_forward(given.data_ptr()), self._outputs).float()

    def step(self, x: Tensor, target: Tensor, rate: float, decay: float = 0.0) -> float:
        """Train on one sample with a float32 target ``[outputs]``; the loss before the update."""
        given, wanted = x.to(self._dtype).contiguous(), target.float().contiguous()
        return float(self._c.net_step(given.data_ptr(), wanted.data_ptr(), rate, decay))

    def tensor(self, name: str, count: int) -> Tensor:
        """A copy of an array of the C, flat.

        Raises:
            DataError: there is none of that name.
        """
        at = self._c.net_data(name.encode())
        if not at:
            raise DataError(f"the exported step has no array {name!r}.")
        return self._read(at, count)

    def _read(self, at: int, count: int) -> Tensor:
        held = (ctypes.c_char * (count * self._dtype.itemsize)).from_address(at)
        return torch.frombuffer(bytearray(held), dtype=self._dtype).clone()
