"""Minifloats beside integers, 3 to 8 bits: accuracy against bits, and against what a multiply-accumulate unit costs.

    apt-get install dataset-fashion-mnist
    python benchmarks/quality/minifloat.py [--networks cnn vit] [--bits 3 4 5 6 7 8] [--test 2000] [--plot FILE]

Weights and inputs of all convolutions and linear layers, first and last ones too, are in one format (or 4-bit weights
beside 8-bit inputs), weights with a scale a channel, inputs with one for the tensor, at the 99.999th percentile of 128
training images. As in Aggarwal et al. 2023 (arXiv:2311.12359) every format gets the best of several techniques:

    nearest   BatchNorms folded, layers equalised (the ViT: SmoothQuant), round to nearest, biases corrected
    gptq      GPTQ instead of round to nearest
    learned   up or down learned for each weight (AdaRound on the format's own grid) over windows of a block, the whole
              CNN in one; biases as they are, since a window has made up for its layers' means already

(by top-1 on the test images; the rows of all techniques are kept). A ResNet-8-like CNN
(fashion_cnn.py) and the ViT of vit.py are trained on Fashion-MNIST first, with fixed seeds, and kept in --work. LUTs
and toggles are of benchmarks/results/mac.json; where a pair isn't there, the estimate of nybble.costs.mac, marked. All
inputs are signed, also behind a ReLU. Rows that are there already (same network, format, technique, images) are kept.
Result: benchmarks/results/minifloat.json, with the Pareto front of each axis.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from fashion_cnn import trained
from run import hardware, named
from transformers import ViTForImageClassification
from vit import WANTS, find, fit

import nybble
from nybble.core.versions import versions
from nybble.costs.mac import luts
from nybble.data.images import ImageSamples, image_samples
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
SAME = ("network", "weights", "inputs", "technique")


def main() -> None:
    """Train or load, quantize in every way, judge; then the Pareto fronts."""
    args = arguments()
    train = str(find(args.images, "train"))
    calibration = image_samples(train, WANTS, samples=128, seed=0)
    test = image_samples(str(find(args.images, "t10k")), WANTS, samples=args.test)
    found = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"rows": []}
    found |= {"hardware": hardware("cpu"), "versions": versions(), "steps": args.steps}
    found["calibration"] = named(calibration)
    for network in args.networks:
        model, about = load(network, args, train)
        exact = classify(model, test.pixel_values)
        about = {"training": about, "test": named(test)}
        found[network] = {"float": classification(exact, None, test.labels), **about}
        for weights, inputs in pairs(args.bits, args.mixed):
            for technique in args.techniques:
                row = {"network": network, "weights": weights, "inputs": inputs, "technique": technique}
                row["images"] = len(test.pixel_values)
                if any(all(r[key] == row[key] for key in (*SAME, "images")) for r in found["rows"]):
                    continue
                row |= judged(model, recipe_of(row, args.steps), calibration, test, exact)
                found["rows"] = [r for r in found["rows"] if any(r[key] != row[key] for key in SAME)] + [row]
                print(row, flush=True)
                write(args.out, found)
    write(args.out, found)
    if args.plot:
        draw(found, args.plot)


def write(out: Path, found: dict[str, Any]) -> None:
    """With what units cost, and the fronts."""
    found["rows"] = [{**row, **cost(row["weights"], row["inputs"])} for row in found["rows"]]
    found["best"], found["pareto"] = {}, {}
    for network in sorted({row["network"] for row in found["rows"]}):
        best = best_of([row for row in found["rows"] if row["network"] == network])
        found["best"][network] = {
            label(r): {k: r[k] for k in ("technique", "top1", "layer_bits", "luts")} for r in best
        }
        axes = ("layer_bits", "luts", "toggles")
        found["pareto"][network] = {axis: [label(r) for r in front(best, axis)] for axis in axes}
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def pairs(bits: list[int], mixed: bool) -> list[tuple[str, str]]:
    """Formats of weights and inputs."""
    same = [(name, name) for width in bits for name in FORMATS[width]]
    return same + (list(MIXED) if mixed else [])


def recipe_of(row: dict[str, Any], steps: int) -> Recipe:
    """A technique over one pair of formats."""
    scheme = {"weights": f"{row['weights']} channel"}
    scheme["inputs"] = f"{row['inputs']} tensor static scale=percentile(p=99.999)"
    learned = {"reconstruction": "mse", "weights": "adaround", "steps": steps, "rates": {"rounding": 0.005}}
    learned["schedule"] = "constant"
    middle: dict[str, list[dict[str, Any]]] = {
        "nearest": [{"solver": "rtn"}], "gptq": [{"solver": "gptq"}], "learned": [{"solver": "rtn"}, learned],
    }  # fmt: skip
    stages = [{"transform": "fold-batchnorm"}, EQUAL[row["network"]], *middle[row["technique"]]]
    stages += [] if row["technique"] == "learned" else [{"correction": "bias"}]
    return parse_recipe({"name": row["technique"], "scheme": scheme, "steps": stages})


def judged(
    model: Any, recipe: Recipe, calibration: ImageSamples, test: ImageSamples, exact: torch.Tensor
) -> dict[str, Any]:
    """Top-1 on test images, and the bits of what was quantized, scales included."""
    started = time.perf_counter()
    settings = nybble.Settings(batch=32)
    quantized, report = nybble.quantize(copy.deepcopy(model), recipe, calibration, settings=settings)
    seconds = round(time.perf_counter() - started, 1)
    hold_dense(quantized, torch.float32)
    found = classification(classify(quantized, test.pixel_values), exact, test.labels)
    return {**found, "layer_bits": round(report.bits, 4), "seconds": seconds}


def cost(weights: str, inputs: str) -> dict[str, Any]:
    """A unit's LUTs and toggles as mapped, else the estimate of its LUTs."""
    unit = MacUnit(weights=get_format(weights), inputs=get_format(inputs))
    units = json.loads((RESULTS / "mac.json").read_text(encoding="utf-8"))["units"]
    for row in units:
        if (row["weights"], row["inputs"], row["length"]) == (unit.weights.name, unit.inputs.name, unit.length):
            return {"luts": row["luts"], "toggles": row["toggles"], "cost": "mapped"}
    return {"luts": round(luts(unit), 1), "toggles": None, "cost": "estimated"}


def best_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each pair of formats the technique with the highest top-1."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if label(row) not in best or row["top1"] > best[label(row)]["top1"]:
            best[label(row)] = row
    return list(best.values())


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


def load(network: str, args: argparse.Namespace, train: str) -> tuple[Any, dict[str, Any]]:
    """A network in float, and how it was trained."""
    folder = args.work / f"{network}-fashion-mnist"
    if network == "cnn":
        samples = image_samples(train, WANTS, samples=args.train, fewer=True)
        model: Any = trained(samples, folder, epochs=args.epochs)
    else:
        if not folder.exists():
            samples = image_samples(train, WANTS, samples=args.train, fewer=True)
            fit(samples, argparse.Namespace(epochs=args.epochs, batch=256, device="cpu")).save_pretrained(folder)
            about = {"epochs": args.epochs, "batch": 256, "seed": 0, "samples": len(samples.pixel_values)}
            (folder / "training.json").write_text(json.dumps(about | {"hardware": hardware("cpu")}), encoding="utf-8")
        make: Any = ViTForImageClassification.from_pretrained
        model = make(folder).eval().requires_grad_(False)
    return model, json.loads((folder / "training.json").read_text(encoding="utf-8"))


def draw(found: dict[str, Any], path: Path) -> None:
    """Top-1 against bits and against LUTs, a row of two for each network; the fronts as lines."""
    from matplotlib.figure import Figure

    networks = list(found["best"])
    figure = Figure(figsize=(11, 4.5 * len(networks)), layout="constrained")
    for axes, network in zip(figure.subplots(len(networks), 2, squeeze=False), networks, strict=True):
        rows = best_of([row for row in found["rows"] if row["network"] == network])
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
    parser.add_argument("--images", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--networks", nargs="+", choices=("cnn", "vit"), default=["cnn", "vit"])
    parser.add_argument("--bits", nargs="+", type=int, choices=tuple(FORMATS), default=list(FORMATS))
    parser.add_argument(
        "--mixed", action=argparse.BooleanOptionalAction, default=True, help="4-bit weights, 8-bit inputs"
    )
    techniques = ("nearest", "gptq", "learned")
    parser.add_argument("--techniques", nargs="+", choices=techniques, default=list(techniques))
    parser.add_argument("--steps", type=int, default=100, help="of learned rounding, a block")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--train", type=int, help="at most so many training images")
    parser.add_argument("--test", type=int, help="so many test images instead of all 10,000")
    parser.add_argument("--work", type=Path, default=Path("benchmark-work"))
    parser.add_argument("--out", type=Path, default=RESULTS / "minifloat.json")
    parser.add_argument("--plot", type=Path, help="draw to this file too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
