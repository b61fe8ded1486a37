"""Data-Free NAS: images made of a ResNet-18 of Fashion-MNIST; what students learn, and searches find, on them.

    apt-get install dataset-fashion-mnist
    python benchmarks/data_free.py --device cuda --seeds 0 1 2 --out benchmarks/results/data_free.json

1. the teacher (benchmarks/small_models.py resnet18), and four sets of images of it: noise; one-hot (drawn classes, no
   more); one round of label calibration; recursive (``--rounds`` of them, and a canvas larger than the window)
2. a student of ten blocks learns from each set alone; 20 networks of each space, drawn at the searches' budget of
   multiply-accumulates, learn from the real training images
3. SPOS, DARTS and ProxylessNAS search on the recursive set and on the real images, with the teacher's answers to both;
   what they find learns from the real images. SPOS scores the networks drawn in 2, too: Kendall's tau

Judged are the 10,000 real test images. Rows run side by side; those that are done are in ``--work``, and a second call
goes on, also within a search.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from benchmarks import small_models
from benchmarks.at_once import arguments, file_of, run

from nybble.core.files import atomic_write_json
from nybble.core.versions import versions
from nybble.pipelines.search_architecture import ArchitectureSettings, search_architecture
from nybble.pipelines.synthesise import synthesise
from nybble.training.synthesis.options import Synthesis

SIDE = 32  # of what the teacher sees
SETS = ("noise", "one-hot", "one round", "recursive")
OPERATIONS = ("shuffle-3", "shuffle-5", "shuffle-7", "xception")
SPACES: dict[str, tuple[str, dict[str, Any]]] = {
    "spos": (
        "macs=0.81",
        {"stem": 16, "stem_stride": 1, "head": 256, "stages": [[32, 3, 2], [64, 4, 2], [128, 3, 2]],
         "operations": list(OPERATIONS)},
    ),
    "proxyless": (
        "macs=0.5",
        {"stem": 16, "stem_stride": 1, "head": 256, "stages": [[24, 3, 2], [48, 3, 2], [96, 3, 2]],
         "operations": [*(f"mb-{e}-{k}" for e in (3, 6) for k in (3, 5, 7)), "skip"]},
    ),
    "darts": ("macs=0.2", {"channels": 8, "most": 24, "cells": 5, "found_cells": 8}),
}  # fmt: skip
"""Budget and space of each method."""


def training(options: argparse.Namespace, steps: int, lr: float = 2e-3) -> dict[str, Any]:
    """As options of a method."""
    gpu = options.device == "cuda"
    return {
        "steps": steps, "batch": options.batch, "lr": lr, "schedule": "cosine", "warmup": 0.05,
        "augment": "flip crop=2", "optimizer": "torch.AdamW weight_decay=0.05" + " fused=true" * gpu,
        "dtype": "bfloat16" if gpu else "float32",
        "save_every": 500,
    }  # fmt: skip


def begin(options: argparse.Namespace) -> Path:
    """The teacher's folder."""
    folder: Path = options.work / "teacher"
    if not folder.exists():
        words = ["small_models.py", "resnet18", "--out", str(folder), "--device", options.device]
        words += ["--steps", str(options.float_steps), "--images", str(options.images)]
        words += ["--train", str(options.held), "--test", str(options.held)] if options.held else []
        given, sys.argv = sys.argv, words
        try:
            small_models.main()
        finally:
            sys.argv = given
    return folder


def real(options: argparse.Namespace, part: str) -> str:
    """The IDX file of a part; of ``--held`` images, a file of the first so many."""
    found = small_models.find(options.images, part)
    if not options.held:
        return str(found)
    few: Path = options.work / f"{part}.npz"
    if not few.exists():
        from nybble.data.images import read_images

        held = read_images(str(found))
        assert held.labels is not None
        np.savez(few, images=np.asarray(held.images[: options.held]), labels=held.labels[: options.held])  # type: ignore[index]
    return str(few)


def made(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A set of images."""
    folder: Path = options.work / "sets" / name.replace(" ", "-")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if name == "noise":
        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        deviation, mean = 255 * small_models.DEVIATION, 255 * small_models.MEAN
        images = rng.normal(mean, deviation, (options.images_made, SIDE, SIDE)).clip(0, 255).astype(np.uint8)
        np.savez(folder / "images.npz", images=images, labels=np.arange(len(images)) % 10)
        return {"images": len(images)}
    rounds = {"one-hot": 1, "one round": 2, "recursive": options.rounds}[name]
    recursive = name == "recursive"
    asked = Synthesis(
        count=options.images_made, batch=options.together, rounds=rounds, keep="all" if recursive else "last",
        half_steps=0, full_steps=options.made_steps, warmup=min(100, options.made_steps // 4),
        canvas=36 if recursive else SIDE, norms=options.norms,
    )  # fmt: skip
    if not folder.exists():
        synthesise(options.work / "teacher", folder, asked, device=options.device, resume=True)
    told: dict[str, Any] = json.loads((folder / "synthesis.json").read_text())
    return {key: told[key] for key in ("images", "agreement", "rounds", "smallest", "largest")}


def set_of(name: str, options: argparse.Namespace) -> str:
    """A SRC."""
    return str(options.work / "sets" / name.replace(" ", "-")) if name in SETS else real(options, "train")


def searched(
    name: str, method: str, data: str, options: argparse.Namespace, seed: int, budget: str, asked: dict[str, Any]
) -> dict[str, Any]:
    """One call of nybble's; what a row has of it."""
    out = file_of(options.work, name).with_suffix("")
    if not out.exists():
        search_architecture(
            options.work / "teacher", out, budget=budget, method=method, data=data, judged_on=real(options, "t10k"),
            options=asked, settings=ArchitectureSettings(device=options.device, seed=seed, resume=True),
        )  # fmt: skip
    told: dict[str, Any] = json.loads((out / "search.json").read_text())
    found = {key: told[key] for key in ("cost", "full", "measures", "encoding", "front", "compared")}
    return {**found, "training": json.loads((out / "times.json").read_text())}


def row(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """``set NAME``, ``student SET #SEED``, ``drawn METHOD #NUMBER``, ``METHOD DATA #SEED``."""
    words, _, number = name.partition(" #")
    kind, _, what = words.partition(" ")
    last = {f"retrain.{key}": value for key, value in training(options, options.steps).items()}
    if kind == "set":
        return made(what, options)
    if kind == "student":
        _, space = SPACES["spos"]
        asked = {
            **{f"chain.{k}": v for k, v in space.items()},
            "operations": ["shuffle-3"] * 10,
            "hard": what == "one-hot",
        }
        return searched(name, "alone", set_of(what, options), options, int(number), "macs=1", {**last, **asked})
    train = real(options, "train")
    if kind == "drawn":
        budget, space = SPACES[what]
        place = "cells" if what == "darts" else "chain"
        asked = {place: space, "chain": None} if what == "darts" else {place: space}
        asked |= {**last, "retrain_on": train}
        return searched(name, "alone", train, options, int(number), budget, asked)
    budget, space = SPACES[kind]
    asked = {f"space.{key}": value for key, value in space.items()} | last | {"retrain_on": train}
    asked |= {f"supernet.{key}": value for key, value in training(options, options.super_steps).items()}
    asked |= {"norm_batches": 4}
    if kind == "spos":
        found = [file_of(options.work, f"drawn spos #{i}") for i in range(options.drawn)]
        asked["start"] = [json.loads(file.read_text())["encoding"]["operations"] for file in found if file.exists()]
        asked |= {"held": 100 if options.device == "cuda" else 4, "evolution.population": max(40, options.drawn)}
        asked |= {"evolution.parents": 10, "evolution.mutations": 15, "evolution.crossovers": 15}
        asked |= {"evolution.generations": options.generations, "evolution.probability": 0.1}
    else:
        asked |= {"alpha_lr": 3e-3}
    return searched(name, kind, set_of(what, options), options, int(number), budget, asked)


def accuracies(rows: dict[str, Any], begins: str) -> list[float]:
    """In percent, of rows whose name begins so."""
    return [100 * found["measures"]["accuracy"] for name, found in rows.items() if name.startswith(begins)]


def tau(rows: dict[str, Any], name: str) -> float | None:
    """Kendall's, of a supernet's errors and what the networks drawn say alone."""
    from scipy.stats import kendalltau

    scores = {point["name"]: point["score"] for point in rows[name]["front"]}
    pairs = []
    for drawn, found in rows.items():
        if drawn.startswith("drawn spos"):
            key = " ".join(str(OPERATIONS.index(word)) for word in found["encoding"]["operations"])
            if key in scores:
                pairs.append((-scores[key], found["measures"]["accuracy"]))
    return float(kendalltau(*zip(*pairs, strict=True)).statistic) if len(pairs) > 2 else None


def summary(rows: dict[str, Any]) -> dict[str, Any]:
    """Means and deviations over seeds, medians of what was drawn."""
    found: dict[str, Any] = {}
    groups = [f"student {name}" for name in SETS] + [f"{m} {d}" for m in SPACES for d in ("recursive", "real")]
    for group in groups:
        if values := accuracies(rows, f"{group} #"):
            found[group] = {"mean": statistics.mean(values), "values": values}
            if len(values) > 1:
                found[group]["deviation"] = statistics.stdev(values)
        if group.startswith("spos") and values:
            found[group]["tau"] = [tau(rows, name) for name in rows if name.startswith(f"{group} #")]
        if group.startswith("darts") and values:
            told = [rows[name]["measures"]["skip connections"] for name in rows if name.startswith(f"{group} #")]
            found[group]["skip connections"] = told
    for method in SPACES:
        if values := accuracies(rows, f"drawn {method} #"):
            found[f"drawn {method}"] = {"median": statistics.median(values), "values": values}
    return found


def main(options: argparse.Namespace) -> None:
    """Stage by stage; print and write."""
    if options.row:
        began = time.monotonic()
        found = row(options.row, options)
        atomic_write_json(file_of(options.work, options.row), {**found, "seconds": round(time.monotonic() - began, 1)})
        return
    ends = time.monotonic() + options.seconds
    teacher = begin(options)
    for part in ("train", "t10k"):
        real(options, part)  # before several want to write it
    stages = [
        [f"set {name}" for name in SETS],
        [
            *(f"drawn {method} #{number}" for method in SPACES for number in range(options.drawn)),
            *(f"student {name} #{seed}" for seed in options.seeds for name in SETS),
        ],
        [f"{method} {data} #{seed}" for seed in options.seeds for method in SPACES for data in ("recursive", "real")],
    ]
    rows: dict[str, Any] = {}
    for stage in stages:
        names = [name for name in stage if not options.rows or any(word in name for word in options.rows)]
        done = run(__file__, names, options.work, workers=options.workers, ends=ends, device=options.device)
        rows |= done
        if len(done) < len(names):
            print(f"{len(names) - len(done)} rows of this stage are left; call again", flush=True)
            break
    result = {
        "what": (__doc__ or "").split("\n")[0], "versions": versions(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "options": {key: getattr(options, key) for key in TOLD},
        "teacher": json.loads((teacher / "made.json").read_text())["held out"],
        "summary": summary(rows), "rows": rows,
    }  # fmt: skip
    print(json.dumps(result["summary"], indent=1))
    if options.out:
        atomic_write_json(options.out, result)


TOLD = (
    "steps", "super_steps", "made_steps", "images_made", "together", "rounds", "norms", "drawn", "generations", "batch",
    "float_steps", "held",
)  # fmt: skip


def own(parser: argparse.ArgumentParser) -> None:
    """What other studies haven't."""
    parser.add_argument("--images", type=Path, default=small_models.FOLDER, help="where the IDX files are")
    parser.add_argument("--images-made", type=int, default=10_000, help="of a set")
    parser.add_argument("--together", type=int, default=1000, help="images of a batch that is made")
    parser.add_argument("--rounds", type=int, default=5, help="of the recursive set")
    parser.add_argument("--made-steps", type=int, default=600, help="updates of a round")
    parser.add_argument("--norms", type=float, default=0.05, help="weight of the BatchNorm statistics")
    parser.add_argument("--super-steps", type=int, default=1000, help="updates of a supernet")
    parser.add_argument("--drawn", type=int, default=20, help="networks of each space")
    parser.add_argument("--generations", type=int, default=8, help="of evolution")


if __name__ == "__main__":
    main(arguments(__doc__ or "", "data_free", "small_models", own, steps=1000, float_steps=3000))
