"""What training on a microcontroller comes to: ResNet8 on images, DS-CNN on words, in the exported C itself.

    apt-get install dataset-fashion-mnist espeak-ng
    python benchmarks/c_train_quality.py --out benchmarks/results/c_train_quality.json

The C is that of `nybble export --target c-train` with the two-lane kernels, called as a library: every weight is, bit
for bit, what the device would have. Images of the training set train, those of the test set judge.

commands   DS-CNN with instance norms from random weights, on synthesised words (quality/spoken_commands.py)
scratch    ResNet8 with instance norms from random weights, one pass, SGD of one image a step, a rate that falls to zero
continual  ResNet8 with BatchNorms learns eight classes here (batches, float32); then, exported and folded, it sees all
           ten in equal shares, and only its last layers learn: the classifier, or the last block too

Each with three seeds, which draw weights and images, in float32, float16 and bfloat16; intervals are 95 % of Student's
t.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.files import atomic_file
from nybble.core.progress import Bars, task
from nybble.core.versions import VERSION
from nybble.data.images import ImageSamples
from nybble.microcontroller.compiler import Library, version
from nybble.microcontroller.networks import ds_cnn, resnet8
from nybble.microcontroller.project import write_project
from nybble.microcontroller.settings import Settings
from nybble.microcontroller.stack import Stack
from nybble.microcontroller.trace import stack_of

sys.path.insert(0, str(Path(__file__).parent / "quality"))
import spoken_commands
from fashion import FOLDER, images, train
from run import hardware

SHAPE, CLASSES, OLD = (1, 28, 28), 10, 8
"""Of both data sets ten classes; the first eight of Fashion-MNIST's are the old ones."""
RUNS = ("scratch", "continual", "commands")
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
LAST = {"classifier": ("8",), "last block and classifier": ("5.*", "8")}


def device(stack: Stack, type_: str, work: Path, update: tuple[str, ...] = ()) -> Library:
    """A stack as the device has it."""
    folder = Path(tempfile.mkdtemp(dir=work, prefix="export-"))
    settings = Settings(type=type_, update=update)
    write_project(stack, folder, settings)
    return Library(folder, settings.dtype, CLASSES, LANES=2)


def stream(on: Library, data: ImageSamples, order: Tensor, rate: float, what: str) -> float:
    """Train on images in an order, at a rate that falls to zero; the mean loss of the last tenth."""
    assert data.labels is not None
    targets, losses = nn.functional.one_hot(data.labels, CLASSES).float(), []
    with task(Bars(), len(order), what) as bar:
        for number, place in enumerate(order.tolist()):
            now = rate * (1 - number / len(order))
            losses.append(on.step(data.pixel_values[place], targets[place], now))
            bar.advance()
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def right(on: Library, data: ImageSamples) -> dict[str, float]:
    """Shares of test images whose class is found: of all, of old classes, of new ones."""
    assert data.labels is not None
    found = torch.tensor([int(on.forward(x).nan_to_num(-1e9).argmax()) for x in data.pixel_values]) == data.labels
    old = data.labels < OLD
    parts = {"all": found, "old": found[old], "new": found[~old]}
    return {name: round(float(part.float().mean()), 4) for name, part in parts.items()}


def from_random(
    options: argparse.Namespace, run: str, data: tuple[ImageSamples, ImageSamples], count: int, rate: float, work: Path
) -> list[dict[str, Any]]:
    """One pass over ``count`` samples with each seed and type."""
    (training, test), rows = data, []
    shape = tuple(training.pixel_values.shape[1:])
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        network = resnet8(1, CLASSES, options.width) if run == "scratch" else ds_cnn(1, CLASSES, options.width * 4)
        stack = stack_of(network, shape)
        order = torch.randperm(len(training.pixel_values))[:count]
        for type_ in options.types:
            on = device(stack, type_, work)
            loss = stream(on, training, order, rate, f"{run}, {type_}, seed {seed}")
            found = {"loss": round(loss, 4), "all": right(on, test)["all"]}
            rows.append({"run": run, "type": type_, "seed": seed, **found})
            print(rows[-1], flush=True)
    return rows


def words(options: argparse.Namespace) -> tuple[ImageSamples, ImageSamples]:
    """Spoken commands as images of coefficients; other voices judge."""
    x, labels = spoken_commands.utterances(options.utterances, spoken_commands.TRAIN, seed=0)
    judged, right_ones = spoken_commands.utterances(options.utterances // 4, spoken_commands.TEST, seed=1)
    empty = ImageSamples(pixel_values=x, labels=labels, sha256="", available=len(x), source="espeak-ng", note="")
    training = replace(empty, pixel_values=spoken_commands.normalised(x, x))
    return training, replace(empty, pixel_values=spoken_commands.normalised(judged, x), labels=right_ones)


def pretrained(options: argparse.Namespace, training: ImageSamples, seed: int) -> Stack:
    """A network that knows the old classes, from ordinary training."""
    assert training.labels is not None
    torch.manual_seed(seed)
    network, old = resnet8(1, CLASSES, options.width, "batch"), training.labels < OLD
    known = replace(training, pixel_values=training.pixel_values[old], labels=training.labels[old])
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    train(network, known, optimizer, epochs=options.epochs, batch=128, rise=0.2, seed=seed)
    return stack_of(network, SHAPE)


def continual(
    options: argparse.Namespace, training: ImageSamples, test: ImageSamples, work: Path
) -> list[dict[str, Any]]:
    assert training.labels is not None
    rows = []
    for seed in range(options.seeds):
        stack = pretrained(options, training, seed)
        torch.manual_seed(1000 + seed)
        each = options.continual // CLASSES
        drawn = [torch.nonzero(training.labels == label).flatten() for label in range(CLASSES)]
        order = torch.cat([places[torch.randperm(len(places))[:each]] for places in drawn])
        order = order[torch.randperm(len(order))]
        for type_ in options.types:
            for name, update in LAST.items():
                on = device(stack, type_, work, update)
                before = right(on, test)
                loss = stream(on, training, order, options.last_rate, f"{name}, {type_}, seed {seed}")
                row = {"run": "continual", "learns": name, "type": type_, "seed": seed, "loss": round(loss, 4)}
                rows.append({**row, "before": before, **right(on, test)})
                print(rows[-1], flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, half the width of their intervals, and the difference to float32 of the same seeds."""
    found = []
    for run, learns, type_ in dict.fromkeys((r["run"], r.get("learns", "all"), r["type"]) for r in rows):
        of = {
            kind: [r for r in rows if (r["run"], r.get("learns", "all"), r["type"]) == (run, learns, kind)]
            for kind in (type_, "float32")
        }
        line: dict[str, Any] = {"run": run, "learns": learns, "type": type_, "seeds": len(of[type_])}
        for part in (name for name in ("all", "old", "new") if name in of[type_][0]):
            line[part] = interval([r[part] for r in of[type_]])
            if len(of["float32"]) == len(of[type_]):
                pairs = zip(of[type_], of["float32"], strict=True)
                line[f"{part}, less float32's"] = interval([a[part] - b[part] for a, b in pairs])
        found.append(line)
    return found


def interval(values: list[float]) -> list[float]:
    """Mean, and half of its 95 % interval; the latter 0 of one value."""
    half = STUDENT.get(len(values), 2.0) * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return [round(statistics.fmean(values), 4), round(half, 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--images", type=Path, default=FOLDER, help="where Fashion-MNIST's four files are")
    parser.add_argument("--runs", nargs="+", default=[*RUNS], choices=[*RUNS])
    parser.add_argument("--types", nargs="+", default=["float32", "float16", "bfloat16"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--width", type=int, default=16, help="channels of ResNet8's first stage; DS-CNN's four times that"
    )
    parser.add_argument("--samples", type=int, default=6000, help="images of a training from scratch")
    parser.add_argument(
        "--continual", type=int, default=2000, help="images of all ten classes that the last layers see"
    )
    parser.add_argument("--utterances", type=int, default=4000, help="spoken commands; a quarter as many judge")
    parser.add_argument("--judged", type=int, default=2000, help="test images")
    parser.add_argument("--epochs", type=int, default=3, help="of the ordinary training of eight classes")
    parser.add_argument("--pool", type=int, default=20000, help="training images to draw from")
    parser.add_argument("--rate", type=float, default=0.1, help="from scratch")
    parser.add_argument("--last-rate", type=float, default=0.05, help="of last layers")
    options = parser.parse_args()
    training, test = (
        images(options.images, "train", options.pool, seed=0),
        images(options.images, "t10k", options.judged),
    )
    with tempfile.TemporaryDirectory(prefix="nybble-") as name:
        work, rows = Path(name), []
        if "scratch" in options.runs:
            rows += from_random(options, "scratch", (training, test), options.samples, options.rate, work)
        if "continual" in options.runs:
            rows += continual(options, training, test, work)
        if "commands" in options.runs:
            rows += from_random(options, "commands", words(options), options.utterances, options.rate, work)
    report = {
        "what": (__doc__ or "").partition("\n")[0], "nybble": VERSION, "gcc": version(), "hardware": hardware("cpu"),
        "python": platform.python_version(), "torch": torch.__version__, "load_average": round(os.getloadavg()[0], 2),
        "settings": {k: v for k, v in vars(options).items() if k not in ("out", "images")},
        "images": {"training": training.sha256, "test": test.sha256},
        "summary": summary(rows), "rows": rows,
    }  # fmt: skip
    for line in report["summary"]:
        print(line)
    if options.out is not None:
        with atomic_file(options.out) as file:
            file.write((json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
