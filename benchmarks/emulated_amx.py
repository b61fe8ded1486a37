"""Products of whole numbers by AMX, on an emulated Sapphire Rapids: their bits against the portable set's.

    python benchmarks/emulated_amx.py --bochs FOLDER [--out FILE]

FOLDER is a built tree of the emulator Bochs 3 (``--with-nogui --enable-x86-64 --enable-cpu-level=6 --enable-avx
--enable-evex --enable-amx``); g++, isolinux (its modules too) and xorriso are needed. No times: an emulator has none.
Bochs 3.0 (783b58f) multiplies both operands of ``tdpbusd`` as unsigned bytes, where Intel's definition says unsigned
times signed; ``DPBDUS`` in its ``cpu/avx/amx.cc`` has to be mended first, and the result says whether it was.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
NATIVE = HERE.parent / "src" / "nybble" / "kernels" / "_native"
FLAGS = (
    "-std=c++17", "-O2", "-fno-pic", "-fno-stack-protector", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off",
    "-mno-red-zone", "-fcf-protection=none", "-fno-tree-loop-distribute-patterns",
)  # fmt: skip
BOOT = (
    "/usr/lib/ISOLINUX/isolinux.bin",
    *(f"/usr/lib/syslinux/modules/bios/{n}.c32" for n in ("ldlinux", "mboot", "libcom32")),
)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--bochs", type=Path, required=True)
    ask.add_argument("--root", type=Path, default=Path("/"), help="where isolinux and xorriso are installed")
    ask.add_argument("--limit", type=int, default=1800, help="seconds")
    ask.add_argument("--out", type=Path, default=HERE / "results" / "emulated_amx.json")
    given = ask.parse_args()
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        image(room, given.root)
        said = emulated(room, given.bochs, given.limit)
    found = {
        word: [int(n) for n in re.findall(rf"{word} (-?\d+)", said)]
        for word in ("isa", "whole", "instruction", "cases", "bad", "failed")
    }
    version = subprocess.run([given.bochs / "bochs", "--help"], capture_output=True, text=True, check=False).stdout
    result = {
        "what": "Products of whole numbers, emulated: sets 4 (AVX-512 VNNI) and 5 (AMX) against the portable one.",
        "emulator": " ".join(re.findall(r"Bochs x86 Emulator \S+", version)[:1]),
        "processor": "sapphire_rapids",
        "compiler": run("g++", "--version").splitlines()[0],
        "set_whole": found["whole"][0],
        "wrong_sums_of_the_instruction": found["instruction"][0],
        "products": found["cases"][0],
        "products_that_differ": found["bad"][-1],
        "failed": found["failed"][-1],
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def run(*command: str | Path) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def image(room: Path, root: Path) -> None:
    """A disk that starts the program, at room/boot.iso."""
    disk = room / "disk" / "isolinux"
    disk.mkdir(parents=True)
    objects = [room / f"{path.stem}.o" for path in (*sorted(NATIVE.glob("*.cpp")), HERE / "emulated" / "main.cpp")]
    for path, to in zip((*sorted(NATIVE.glob("*.cpp")), HERE / "emulated" / "main.cpp"), objects, strict=True):
        own = (
            ["-mavx2", "-mfma", "-fno-builtin-memset", "-fno-builtin-memcpy", f"-I{NATIVE}"]
            if path.stem == "main"
            else []
        )
        run("g++", *FLAGS, *own, "-c", path, "-o", to)
    run("gcc", "-c", HERE / "emulated" / "start.S", "-o", room / "start.o")
    library = run("gcc", "-print-libgcc-file-name").strip()
    layout = HERE / "emulated" / "layout.ld"
    run(
        "ld",
        "-nostdlib",
        "-static",
        "-z",
        "noexecstack",
        "-T",
        layout,
        room / "start.o",
        *objects,
        library,
        "-o",
        room / "program",
    )
    run("objcopy", "-O", "elf32-i386", room / "program", disk.parent / "program")
    for part in BOOT:
        shutil.copy(root / part.lstrip("/"), disk)
    (disk / "isolinux.cfg").write_text("DEFAULT l\nLABEL l\n KERNEL mboot.c32\n APPEND /program\n")
    making = [
        "-b",
        "isolinux/isolinux.bin",
        "-c",
        "isolinux/boot.cat",
        "-no-emul-boot",
        "-boot-load-size",
        "4",
        "-boot-info-table",
    ]
    run(
        shutil.which("xorriso") or root / "usr/bin/xorriso",
        "-as",
        "mkisofs",
        "-quiet",
        "-o",
        room / "boot.iso",
        *making,
        disk.parent,
    )


def emulated(room: Path, bochs: Path, limit: int) -> str:
    """What the program writes to its serial port."""
    said = room / "serial.txt"
    lines = (
        "megs: 512",
        f"romimage: file={bochs}/bios/BIOS-bochs-latest",
        f"vgaromimage: file={bochs}/bios/VGABIOS-lgpl/VGABIOS-lgpl-latest.bin",
        "cpu: model=sapphire_rapids, count=1, ips=200000000, reset_on_triple_fault=0",
        f"ata0-master: type=cdrom, path={room}/boot.iso, status=inserted",
        "boot: cdrom",
        f"com1: enabled=1, mode=file, dev={said}",
        f"log: {room}/bochs.log",
        "display_library: nogui",
        "clock: sync=none",
    )
    (room / "bochsrc").write_text("\n".join(lines) + "\n")
    running = subprocess.Popen(
        [bochs / "bochs", "-q", "-f", room / "bochsrc"], cwd=room, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(limit):
            time.sleep(1)
            if said.is_file() and "done" in said.read_text(errors="replace"):
                return said.read_text()
    finally:
        running.kill()
        running.wait()
    raise SystemExit(f"nothing came within {limit} s")


if __name__ == "__main__":
    main()
