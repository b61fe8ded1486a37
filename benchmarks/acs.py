"""ACS against random and one-shot coresets of equal size: 4-bit LSQ on Fashion-MNIST from a float model of ours.

    python benchmarks/small_models.py resnet18 --out models/resnet18 --seconds 60 --device cuda
    python benchmarks/acs.py models/resnet18 --images /usr/share/datasets/fashion-mnist --device cuda

Each row is ``nybble train acs`` with another ``coreset``, at the same fraction, epochs and seeds: ``acs`` chooses again
every --every epochs, ``once`` in front of the first alone, ``random`` draws as often as acs chooses; ``all`` trains on
everything. Held-out images judge. Rows that are done stay in --work. Differences to ``random`` are paired by seed, and
their 95 % intervals are Student's. Result: --out, one file a model.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from benchmarks.small_models import FOLDER, find

from nybble.core.files import atomic_write_json
from nybble.core.versions import versions
from nybble.data.images import read_images
from nybble.pipelines.train import train

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % of Student's t, by the number of seeds


def ways(fraction: float, args: argparse.Namespace) -> dict[str, dict[str, Any] | None]:
    """Options of the coreset, by name."""
    part = {"fraction": fraction, "every": args.every}
    return {
        "random": {**part, "first": "random", "last": None},
        "once": {**part, "every": args.epochs},
        "acs": part,
    }


def main() -> None:
    """Train what isn't there yet, compare, write."""
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    parts = {part: subset(args, part, most) for part, most in (("train", args.train), ("t10k", args.test))}
    rows = [row(args, parts, "all", None, seed) for seed in args.seeds]
    for fraction in args.fractions:
        for name, options in ways(fraction, args).items():
            rows += [row(args, parts, f"{name} {fraction:g}", options, seed) for seed in args.seeds]
    found = {
        "model": args.model.name, "made": json.loads((args.model / "made.json").read_text(encoding="utf-8")),
        "epochs": args.epochs, "every": args.every, "batch": args.batch, "lr": args.lr, "rows": rows,
        "against_random": [against_random(rows, share, name) for share in args.fractions for name in ("once", "acs")],
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor(),
        "versions": versions(),
    }  # fmt: skip
    atomic_write_json(args.out, found)
    for line in found["against_random"]:
        print(line)


def subset(args: argparse.Namespace, part: str, most: int | None) -> Path:
    """The first so many images, as a file."""
    place = args.work / f"{part}-{most or 'all'}.npz"
    if not place.exists():
        images = read_images(str(find(args.images, part)))
        assert images.labels is not None
        every: Any = images.images
        np.savez(place, images=every[:most], labels=images.labels[:most])
    return place


def row(
    args: argparse.Namespace, parts: dict[str, Path], name: str, coreset: dict[str, Any] | None, seed: int
) -> dict[str, Any]:
    """One training, or what an earlier call made of it."""
    out = args.work / f"{args.model.name}-{name.replace(' ', '-')}-{seed}"
    settings = {
        "epochs": args.epochs, "batch": args.batch, "lr": args.lr, "seed": seed, "device": args.device, "resume": True,
        "dtype": "bfloat16" if args.device == "cuda" else "float32", "save_every": 1000, "augment": "flip crop=2",
    }  # fmt: skip
    if not out.exists():
        train(
            "acs", args.model, out, str(parts["train"]), options={"coreset": coreset}, judged_on=str(parts["t10k"]),
            settings=settings, form="native",
        )  # fmt: skip
    told = json.loads((out / "training.json").read_text(encoding="utf-8"))
    models = told["evaluation"]["models"]
    print(f"{name} seed {seed}: {100 * models['after']['accuracy']:.2f} %, {told['steps']} updates", flush=True)
    return {"row": name, "seed": seed, "steps": told["steps"], **{key: m["accuracy"] for key, m in models.items()}}


def against_random(rows: list[dict[str, Any]], fraction: float, name: str) -> dict[str, Any]:
    """Points of accuracy above random at the same fraction, mean of seeds, and half of the 95 % interval."""
    found = {(each["row"], each["seed"]): 100 * each["after"] for each in rows}
    seeds = sorted({seed for _, seed in found})
    apart = [found[f"{name} {fraction:g}", seed] - found[f"random {fraction:g}", seed] for seed in seeds]
    half = STUDENT[len(seeds)] * statistics.stdev(apart) / math.sqrt(len(seeds)) if len(seeds) in STUDENT else None
    return {"row": name, "fraction": fraction, "points": statistics.mean(apart), "half_interval": half}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of small_models.py")
    parser.add_argument("--images", type=Path, default=FOLDER)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.2, 0.4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.25e-3)
    parser.add_argument("--train", type=int, help="the first so many images; left out: all")
    parser.add_argument("--test", type=int, help="the first so many test images; left out: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--work", type=Path, default=Path("benchmark-work/acs"))
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
