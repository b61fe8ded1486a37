"""LLM-FP4 on a vision transformer: a DeiT-like ViT trained on Fashion-MNIST, judged on its 10,000 test images.

    apt-get install dataset-fashion-mnist
    python benchmarks/quality/vit.py --images /usr/share/datasets/fashion-mnist [--device cuda] [--epochs 30]

The model (6 blocks, width 192, 3 heads, patches of 4 x 4) is trained here, with a fixed seed, and kept in --work for
the next run. 128 training images calibrate. Methods: percentile INT, min-max, the FP baseline, LLM-FP4 with the output
loss and with Fisher weights; attention's products are quantized too. Top-1 on real test images, and the time of a
forward with and without shifts, interleaved. Result: benchmarks/results/vit.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from fashion import FOLDER, call_model, images, kept, train
from run import hardware, named
from transformers import ViTConfig, ViTForImageClassification

import nybble
from nybble.core.versions import versions
from nybble.data.images import ImageSamples
from nybble.eval import classification, classify
from nybble.nn.swap import hold_dense
from nybble.recipe import Recipe, load_recipe, parse_recipe

RESULT = Path(__file__).parents[1] / "results" / "vit.json"
FP = {4: "e2m1", 6: "e2m3", 8: "e4m3"}
METHODS = ("percentile-int", "minmax-int", "minmax-fp", "fp-baseline", "llm-fp4", "llm-fp4 fisher")


def main() -> None:
    """Train or load, quantize in every way, judge."""
    args = arguments()
    test, calibration = images(args.images, "t10k", args.test), images(args.images, "train", 128, 0)
    folder, samples = args.work / "vit-fashion-mnist", images(args.images, "train", args.train)
    network, training = trained(samples, folder, epochs=args.epochs, batch=args.batch, device=args.device)
    network = network.to(args.device)
    exact = classify(network, test.pixel_values)
    rows = [{"method": "float", "bits": "16/16", **classification(exact, None, test.labels)}]
    print(rows[0], flush=True)
    forwards = {}
    for bits in ((8, 8), (6, 6), (4, 4)):
        for method in METHODS:
            started = time.perf_counter()
            model = copy.deepcopy(network).bfloat16()
            settings = nybble.Settings(batch=32, device=args.device)
            recipe = recipe_of(method, bits, args.effort)
            quantized, _ = nybble.quantize(model, recipe, calibration, settings=settings)
            seconds = round(time.perf_counter() - started, 1)
            hold_dense(quantized, torch.bfloat16)
            found = classification(classify(quantized, test.pixel_values), exact, test.labels)
            rows.append({"method": method, "bits": f"{bits[0]}/{bits[1]}", "seconds": seconds, **found})
            print(rows[-1], flush=True)
            if bits == (4, 4) and method in ("fp-baseline", "llm-fp4"):
                forwards[method] = quantized
    about = {"training": training}
    about |= {"hardware": hardware(args.device), "versions": versions(), "test": named(test)}
    about |= {
        "effort": args.effort,
        "calibration": named(calibration),
        "shift_time_ratio": shift_time(forwards, test, args.device),
    }
    args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def recipe_of(method: str, bits: tuple[int, int], effort: str) -> Recipe:
    """A recipe over linears and matmuls; ``effort`` is of the methods that search."""
    integer = method.endswith("-int")
    w, a = (f"int{n}" if integer else FP[n] for n in bits)
    rule = " scale=percentile(p=99.9)" if method == "percentile-int" else ""
    columns = "shifted" if method.startswith("llm-fp4") else "tensor"
    rules = [
        {"targets": ["Attention"], "matmuls": f"{a} tensor{rule} static"},
        {"targets": ["Linear"], "weights": f"{w} channel{rule}", "inputs": f"{a} {columns}{rule} static"},
    ]
    name = "rtn" if method == "percentile-int" else method.split()[0]
    base = load_recipe(name).solver
    step = {**base.to_dict(), **(base.quick if effort == "quick" else {})}
    step.pop("quick", None)
    if method.endswith("fisher"):
        step["loss"] = "fisher"
    return parse_recipe({"name": method, "scheme": {"rules": rules}, "steps": [step]})


def build() -> Any:
    """The model, with random weights."""
    torch.manual_seed(0)
    make: Any = ViTConfig
    config = make(
        image_size=28, patch_size=4, num_channels=1, hidden_size=192, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=3, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config)


def trained(samples: ImageSamples, folder: Path, *, epochs: int, batch: int, device: str) -> tuple[Any, dict[str, Any]]:
    """The model from ``folder``, trained and put there first where it isn't yet (AdamW, one cycle); and how it was."""

    def make() -> Any:
        model = build().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05, fused=True)
        return train(
            model, samples, optimizer, epochs=epochs, batch=batch, rise=0.1, device=device, logits=call_model,
            bfloat16=device != "cpu",
        )  # fmt: skip

    return kept(folder, build, make, epochs=epochs, batch=batch, seed=0, samples=len(samples.pixel_values))


def shift_time(models: dict[str, Any], test: ImageSamples, device: str) -> float:
    """Time of a forward with shifts over that without, medians of interleaved runs."""
    x = test.pixel_values[:256].to(device, torch.bfloat16)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for _ in range(20):
            for name, model in models.items():
                wait(device)
                started = time.perf_counter()
                model(pixel_values=x)
                wait(device)
                seconds[name].append(time.perf_counter() - started)
    middle = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
    return middle["llm-fp4"] / middle["fp-baseline"]


def wait(device: str) -> None:
    """For the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=FOLDER)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--effort", choices=("quick", "full"), default="full")
    parser.add_argument("--train", type=int, help="at most so many training images")
    parser.add_argument("--test", type=int, help="so many test images instead of all 10,000")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--work", type=Path, default=Path("benchmark-work"))
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
