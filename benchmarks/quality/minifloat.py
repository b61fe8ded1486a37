"""Minifloats beside integers, 3 to 8 bits: accuracy against bits, and against what a multiply-accumulate unit costs.

    apt-get install dataset-fashion-mnist
    python benchmarks/quality/minifloat.py [--networks cnn vit] [--bits 3 4 5 6 7 8] [--seeds 3] [--plot FILE]
    python benchmarks/quality/minifloat.py --device cuda --jobs 12 --seeds 3 --plot benchmarks/results/minifloat.png

Weights and inputs of all convolutions and linear layers, first and last ones too, are in one format (or 4-bit weights
beside 8-bit inputs), weights with a scale a channel, inputs with one for the tensor, at the 99.999th percentile of
--calibration training images, which the seed draws. As in Aggarwal et al. 2023 (arXiv:2311.12359) every format gets the
best of several techniques:

    nearest   BatchNorms folded, layers equalised (the ViT: SmoothQuant), round to nearest, biases corrected
    gptq      GPTQ instead of round to nearest
    learned   up or down learned for each weight (AdaRound on the format's own grid), one residual block of the CNN, one
              block of the ViT after the other; biases as they are, since a window has made up for its layers' means
    layers    the same layer by layer (of the CNN, unless --techniques asks for it)

(by mean top-1 on the test images; the rows of all techniques are kept). All techniques run with the first seed, the
best of each pair of formats with the others. A ResNet-8-like CNN (fashion_cnn.py) and the ViT of vit.py are trained on
Fashion-MNIST first, with fixed seeds, and kept in --work. LUTs and toggles are of benchmarks/results/mac.json; where a
pair isn't there, the estimate of nybble.costs.mac, marked. All inputs are signed, also behind a ReLU. Rows that are
there already (same network and its training, format, technique, seed, images) are kept. Where the package can't be
installed, --data is a folder with its four files. Result: benchmarks/results/minifloat.json, with the Pareto front of
each axis.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import fashion
import fashion_cnn
import torch
import vit
from run import hardware, named
from side_by_side import rows as rows_of
from torch import Tensor

import nybble
from nybble.core.versions import versions
from nybble.costs.mac import luts
from nybble.data.images import ImageSamples
from nybble.eval import classification, classify
from nybble.formats import get_format
from nybble.hardware.mac import MacUnit
from nybble.nn.swap import hold_dense
from nybble.recipe import Recipe, parse_recipe

RESULTS = Path(__file__).parents[1] / "results"
FORMATS = {
    3: ("int3", "e1m1_finite", "e2m0_finite"),
    4: ("int4", "e1m2_finite", "e2m1", "e3m0_finite"),
    5: ("int5", "e2m2_finite", "e3m1_finite", "e4m0_finite"),
    6: ("int6", "e2m3", "e3m2", "e4m1_finite"),
    7: ("int7", "e2m4_finite", "e3m3_finite", "e4m2_finite"),
    8: ("int8", "e2m5_finite", "e3m4_finite", "e4m3_finite", "e5m2_finite"),
}
WIDE = ("int8", "e2m5_finite", "e3m4_finite", "e4m3_finite")
MIXED = tuple((weights, inputs) for weights in ("int4", "e2m1") for inputs in WIDE)
EQUAL = {"cnn": {"transform": "cross-layer"}, "vit": {"transform": "smooth"}}
SAME = ("network", "weights", "inputs", "technique", "seed", "images")
TECHNIQUES = ("nearest", "gptq", "learned", "layers")
USUAL = {"cnn": TECHNIQUES, "vit": TECHNIQUES[:3]}
"""Without layer by layer where there are many layers."""
TRAINERS = {"cnn": (fashion_cnn.trained, 256), "vit": (vit.trained, 512)}
"""How a network is trained, and images of a step."""


@dataclass(frozen=True)
class Place:
    """A network, where images are, and how many of them to take."""

    network: str
    data: Path
    work: Path
    device: str
    epochs: int
    train: int | None
    test: int | None
    calibration: int


@dataclass(frozen=True)
class Task:
    """One quantization."""

    place: Place
    weights: str
    inputs: str
    technique: str
    seed: int
    steps: int


def main() -> None:
    """Train or load, quantize in every way, judge; then the Pareto fronts."""
    args, started = arguments(), time.perf_counter()
    places = [
        Place(network, args.data, args.work, args.device, args.epochs, args.train, args.test, args.calibration)
        for network in args.networks
    ]
    found = begun(args.out, places, args.steps)
    print(f"float {[found[p.network]['float'] for p in places]}, {time.perf_counter() - started:.0f} s", flush=True)
    every = [(place, pair) for place in places for pair in pairs(args.bits, args.mixed)]
    first = [
        Task(place, *pair, technique, 0, args.steps)
        for place, pair in every
        for technique in args.techniques or USUAL[place.network]
    ]
    run(first, found, args)
    best = {
        (n, row["weights"], row["inputs"]): row["technique"] for n in args.networks for row in best_of(of(found, n))
    }
    again = [
        Task(place, *pair, best[place.network, *pair], seed, args.steps)
        for seed in range(1, args.seeds)
        for place, pair in every
    ]
    run(again, found, args)
    if args.plot:
        draw(found, args.plot)
    print(f"{time.perf_counter() - started:.0f} s in all", flush=True)


def begun(out: Path, places: Sequence[Place], steps: int) -> dict[str, Any]:
    """What was recorded; without the rows of networks that were trained, calibrated or judged otherwise."""
    found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"rows": []}
    for place in places:
        ready = Ready.of(place)
        about = {
            "float": classification(ready.exact, None, ready.test.labels), "training": ready.training,
            "test": named(ready.test), "calibration": place.calibration, "steps": steps,
        }  # fmt: skip
        if found.get(place.network) != json.loads(json.dumps(about)):
            found["rows"] = [row for row in found["rows"] if row["network"] != place.network]
        found[place.network] = about
    return found | {"hardware": hardware(places[0].device), "versions": versions()}


def run(tasks: Sequence[Task], found: dict[str, Any], args: argparse.Namespace) -> None:
    """The rows that aren't there yet, learned ones first, so that processes end together."""
    known = {tuple(row[key] for key in SAME) for row in found["rows"]}
    left = [task for task in tasks if tuple(head(task)[key] for key in SAME) not in known]
    left.sort(key=lambda task: (task.technique in ("nearest", "gptq"), task.place.network != "vit"))
    for row in rows_of(judged, left, args.jobs):
        found["rows"].append(row)
        print(row, flush=True)
        write(args.out, found)
    write(args.out, found)


def of(found: dict[str, Any], network: str) -> list[dict[str, Any]]:
    """Rows of a network."""
    return [row for row in found["rows"] if row["network"] == network]


def write(out: Path, found: dict[str, Any]) -> None:
    """With what units cost, and the fronts."""
    found["rows"].sort(key=lambda row: [str(row[key]) for key in SAME])
    found["best"], found["pareto"] = {}, {}
    for network in sorted({row["network"] for row in found["rows"]}):
        best = best_of(of(found, network))
        shown = ("technique", "top1", "spread", "seeds", "layer_bits", "luts", "cost")
        found["best"][network] = {label(r): {k: r[k] for k in shown} for r in best}
        axes = ("layer_bits", "luts", "toggles")
        found["pareto"][network] = {axis: [label(r) for r in front(best, axis)] for axis in axes}
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def pairs(bits: list[int], mixed: bool) -> list[tuple[str, str]]:
    """Formats of weights and inputs."""
    same = [(name, name) for width in bits for name in FORMATS[width]]
    return same + (list(MIXED) if mixed else [])


def recipe_of(task: Task) -> Recipe:
    """A technique over one pair of formats."""
    scheme = {"weights": f"{task.weights} channel"}
    scheme["inputs"] = f"{task.inputs} tensor static scale=percentile(p=99.999)"
    learned = {"reconstruction": "mse", "weights": "adaround", "steps": task.steps, "rates": {"rounding": 0.02}}
    learned |= {"schedule": "constant", "mix": 0.5, **({"unit": "layer"} if task.technique == "layers" else {})}
    middle: dict[str, list[dict[str, Any]]] = {
        "nearest": [{"solver": "rtn"}], "gptq": [{"solver": "gptq"}],
        "learned": [{"solver": "rtn"}, learned], "layers": [{"solver": "rtn"}, learned],
    }  # fmt: skip
    stages = [{"transform": "fold-batchnorm"}, EQUAL[task.place.network], *middle[task.technique]]
    stages += [{"correction": "bias"}] if task.technique in ("nearest", "gptq") else []
    return parse_recipe({"name": task.technique, "scheme": scheme, "steps": stages})


@dataclass(frozen=True)
class Ready:
    """What every task of a process needs."""

    network: Any
    training: dict[str, Any]
    test: ImageSamples
    exact: Tensor

    @staticmethod
    @cache
    def of(place: Place) -> Ready:
        """Load it; train where nobody has."""
        make, batch = TRAINERS[place.network]
        samples, folder = (
            fashion.images(place.data, "train", place.train),
            place.work / f"{place.network}-fashion-mnist",
        )
        network, training = make(samples, folder, epochs=place.epochs, batch=batch, device=place.device)
        network, test = network.to(place.device), fashion.images(place.data, "t10k", place.test)
        return Ready(network, training, test, classify(network, test.pixel_values, 500))


def head(task: Task) -> dict[str, Any]:
    """What tells a task's row from others."""
    row = {"network": task.place.network, "weights": task.weights, "inputs": task.inputs}
    return row | {"technique": task.technique, "seed": task.seed, "images": task.place.test or 10000}


def judged(task: Task) -> dict[str, Any]:
    """Quantize; top-1 on test images, the bits of what was quantized, scales included, and what a unit costs."""
    ready, calibration = Ready.of(task.place), drawn(task.place.data, task.place.calibration, task.seed)
    started = time.perf_counter()
    settings = nybble.Settings(batch=32, device=task.place.device, seed=task.seed)
    made, report = nybble.quantize(copy.deepcopy(ready.network), recipe_of(task), calibration, settings=settings)
    seconds = round(time.perf_counter() - started, 1)
    hold_dense(made, torch.float32)
    found = classification(classify(made, ready.test.pixel_values, 500), ready.exact, ready.test.labels)
    row = {**head(task), **found, "layer_bits": round(report.bits, 4), "seconds": seconds}
    return row | cost(task.weights, task.inputs)


@cache
def drawn(data: Path, samples: int, seed: int) -> ImageSamples:
    """What calibrates."""
    return fashion.images(data, "train", samples, seed)


def cost(weights: str, inputs: str) -> dict[str, Any]:
    """A unit's LUTs and toggles as mapped, else the estimate of its LUTs."""
    unit = MacUnit(weights=get_format(weights), inputs=get_format(inputs))
    units = json.loads((RESULTS / "mac.json").read_text(encoding="utf-8"))["units"]
    for row in units:
        if (row["weights"], row["inputs"], row["length"]) == (unit.weights.name, unit.inputs.name, unit.length):
            return {"luts": row["luts"], "toggles": row["toggles"], "cost": "mapped"}
    return {"luts": round(luts(unit), 1), "toggles": None, "cost": "estimated"}


def best_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each pair of formats the technique with the highest top-1 under the first seed; its mean over all seeds."""
    best: dict[str, dict[str, Any]] = {}
    for row in (row for row in rows if row["seed"] == 0):
        if label(row) not in best or row["top1"] > best[label(row)]["top1"]:
            best[label(row)] = row
    found = []
    for name, row in best.items():
        top1 = [r["top1"] for r in rows if label(r) == name and r["technique"] == row["technique"]]
        spread = round(statistics.stdev(top1), 5) if len(top1) > 1 else None
        found.append({**row, "top1": round(statistics.mean(top1), 5), "spread": spread, "seeds": len(top1)})
    return found


def front(rows: list[dict[str, Any]], axis: str) -> list[dict[str, Any]]:
    """The rows that no other beats in top-1 at no more of ``axis``, cheapest first."""
    known = sorted((r for r in rows if r[axis] is not None), key=lambda r: (r[axis], -r["top1"]))
    found: list[dict[str, Any]] = []
    for row in known:
        if not found or row["top1"] > found[-1]["top1"]:
            found.append(row)
    return found


def label(row: dict[str, Any]) -> str:
    """As people write it: E2M1, INT4, or both sides."""
    names = [row[side].removesuffix("_finite").upper() for side in ("weights", "inputs")]
    return names[0] if names[0] == names[1] else " x ".join(names)


def draw(found: dict[str, Any], path: Path) -> None:
    """Top-1 against bits and against LUTs, a row of two for each network; the fronts as lines."""
    from matplotlib.figure import Figure

    networks = list(found["best"])
    figure = Figure(figsize=(11, 4.5 * len(networks)), layout="constrained")
    for axes, network in zip(figure.subplots(len(networks), 2, squeeze=False), networks, strict=True):
        rows = best_of(of(found, network))
        for ax, axis, said in zip(
            axes, ("layer_bits", "luts"), ("bits a weight, scales included", "LUTs"), strict=True
        ):
            for kind, colour in (("INT", "tab:orange"), ("E", "tab:blue"), ("x", "tab:green")):
                some = [
                    r for r in rows if (" x " in label(r)) == (kind == "x") and (kind == "x" or label(r)[0] == kind[0])
                ]
                names = {"INT": "integer", "E": "minifloat", "x": "4-bit weights, 8-bit inputs"}
                ax.scatter([r[axis] for r in some], [100 * r["top1"] for r in some], 18, colour, label=names[kind])
            best = front(rows, axis)
            ax.plot([r[axis] for r in best], [100 * r["top1"] for r in best], "k-", linewidth=0.7, label="Pareto front")
            for r in best:
                ax.annotate(label(r), (r[axis], 100 * r["top1"]), fontsize=7, textcoords="offset points", xytext=(3, 3))
            ax.axhline(100 * found[network]["float"]["top1"], color="grey", linestyle=":", linewidth=0.8)
            ax.set(xlabel=said, ylabel="top-1, %", title=f"{network}, Fashion-MNIST")
        axes[0].legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=110)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=fashion.FOLDER)
    parser.add_argument("--networks", nargs="+", choices=tuple(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--bits", nargs="+", type=int, choices=tuple(FORMATS), default=list(FORMATS))
    parser.add_argument(
        "--mixed", action=argparse.BooleanOptionalAction, default=True, help="4-bit weights, 8-bit inputs"
    )
    parser.add_argument("--techniques", nargs="+", choices=TECHNIQUES, help="other than the usual ones")
    parser.add_argument("--steps", type=int, default=200, help="of learned rounding, a window")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--calibration", type=int, default=256, help="training images")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--train", type=int, help="at most so many training images")
    parser.add_argument("--test", type=int, help="so many test images instead of all 10,000")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--work", type=Path, default=Path("benchmark-work"))
    parser.add_argument("--out", type=Path, default=RESULTS / "minifloat.json")
    parser.add_argument("--plot", type=Path, help="draw to this file too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
