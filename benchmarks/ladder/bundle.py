"""Trained models as one archive in parts, for places that take only small files.

    python -m benchmarks.ladder.bundle build/ladder OUT [--sizes 0.3m ...] [--architectures llama neox] [--megabytes 15]
    cat OUT/ladder.tar.xz.* | tar -xJ -C build/ladder          (puts models/NAME back)

bfloat16 weights shrink to about two thirds. The logs come along, those of failed trainings too.
"""

from __future__ import annotations

import argparse
import io
import lzma
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.ladder.sizes import ARCHITECTURES, SIZES, names

from nybble.core.files import atomic_write_bytes

CHUNK = 4 * 2**20  # bytes that one thread packs; xz streams may stand one behind another
# The exponent is every other byte: a model that knows which byte comes next halves it and leaves the mantissa alone.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1}]


def bundle(folder: Path, out: Path, models: list[str], part: int, name: str = "ladder") -> list[Path]:
    """Write ``out/NAME.tar.xz.00`` and so on, of at most ``part`` bytes each, and ladder.json; return the parts."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in [folder / "models" / f"{model}{ending}" for model in models for ending in ("", ".log")]:
            if path.exists():
                tar.add(path, arcname=f"models/{path.name}")
    whole = archive.getbuffer()
    with ThreadPoolExecutor() as pool:
        packed = b"".join(pool.map(_pack, [whole[i : i + CHUNK] for i in range(0, len(whole), CHUNK)]))
    out.mkdir(parents=True, exist_ok=True)
    parts = []
    for i, start in enumerate(range(0, len(packed), part)):
        parts.append(out / f"{name}.tar.xz.{i:02d}")
        atomic_write_bytes(parts[-1], packed[start : start + part])
    record = folder / "models" / "ladder.json"
    if record.exists():
        shutil.copyfile(record, out / "ladder.json")
    return parts


def _pack(chunk: memoryview) -> bytes:
    return lzma.compress(chunk, filters=FILTERS)


def main() -> None:
    """Bundle the models asked for, and say which are missing and how large the parts are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--megabytes", type=float, default=15, help="of a part at most")
    parser.add_argument("--name", default="ladder", help="of the archive")
    asked = parser.parse_args()
    models = names(tuple(asked.architectures), tuple(asked.sizes))
    missing = [name for name in models if not (asked.folder / "models" / name / "training.json").exists()]
    if missing:
        print(f"not trained in {asked.folder}: {', '.join(missing)}")
    for path in bundle(asked.folder, asked.out, models, int(asked.megabytes * 1e6), asked.name):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    if missing:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
