"""Small models that the benchmarks of training begin with, one command each; folders as transformers writes them.

    apt-get install dataset-fashion-mnist
    python benchmarks/small_models.py resnet18 --out models/resnet18 --seconds 60 --device cuda
    python benchmarks/small_models.py mobilenetv2 --out models/mobilenetv2 --seconds 60 --device cuda
    python benchmarks/small_models.py deit --out models/deit --seconds 120 --device cuda

    python benchmarks/small_models.py detector --out models/detector --seconds 60 --device cuda
    python benchmarks/small_models.py separator --out models/separator --seconds 120 --device cuda

The first three tell the ten classes of Fashion-MNIST: 60,000 images train, mirrored and shifted, and 10,000 judge. The
detector finds the objects of drawn scenes, the separator takes two drawn voices apart (nybble.data). ``--seconds``
is of training; with ``--steps`` in its place the same seed gives the same weights on the same machine. Beside the
weights stand preprocessor_config.json, of images, and made.json: what held-out examples say, what was done, versions.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from nybble.core.files import AtomicFolder
from nybble.core.progress import Bars, Silent, task
from nybble.core.versions import versions
from nybble.data.images import Preparation
from nybble.data.labelled_images import LabelledImages, load_labelled_images
from nybble.data.labelled_images import collate as together
from nybble.data.samples import InMemory
from nybble.data.scenes import CLASSES
from nybble.models.own.detector import Detector, DetectorConfig
from nybble.models.own.separator import Separator, SeparatorConfig
from nybble.training.tasks import task_of
from nybble.training.tasks._moves import Moves

FOLDER = Path("/usr/share/datasets/fashion-mnist")
NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
MEAN, DEVIATION = 0.286, 0.353  # of the training images
PART = 1000  # images that are judged at a time


@dataclass(frozen=True)
class Data:
    """``draw`` gives as many examples as it is asked for as the model's arguments; ``judge`` its measures."""

    draw: Callable[[int], dict[str, Tensor]]
    judge: Callable[[Any], dict[str, float]]
    about: dict[str, Any]
    prepared: dict[str, Any] | None


@dataclass(frozen=True)
class Kind:
    """``make`` gives the model, with random weights; ``rate`` and ``decay`` are of AdamW."""

    make: Callable[[], Any]
    data: Callable[[argparse.Namespace, torch.Generator], Data]
    rate: float
    decay: float = 0.05
    batch: int = 256


def resnet18() -> Any:
    """As published, for one channel: 11.2 million parameters."""
    config: Any = transformers.ResNetConfig
    return transformers.ResNetForImageClassification(
        config(
            num_channels=1, embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2],
            layer_type="basic", **_classes(),
        )
    )  # fmt: skip


def mobilenetv2() -> Any:
    """As published at width 1, for one channel: 2.2 million parameters."""
    config: Any = transformers.MobileNetV2Config
    return transformers.MobileNetV2ForImageClassification(config(image_size=32, num_channels=1, **_classes()))


def deit() -> Any:
    """DeiT-T's width and depth (192, 12 blocks, 3 heads), patches of 4 x 4: 5.4 million parameters."""
    config: Any = transformers.ViTConfig
    return transformers.ViTForImageClassification(
        config(
            image_size=28, patch_size=4, num_channels=1, hidden_size=192, intermediate_size=768, num_hidden_layers=12,
            num_attention_heads=3, **_classes(),
        )
    )  # fmt: skip


def _classes() -> dict[str, Any]:
    return {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}


def fashion(size: int) -> Callable[[argparse.Namespace, torch.Generator], Data]:
    """Fashion-MNIST in images of so many pixels a side."""

    def data(args: argparse.Namespace, drawn: torch.Generator) -> Data:
        wants = Preparation(height=size, width=size, channels=1, mean=(MEAN,), std=(DEVIATION,))
        train, test = (load_labelled_images(str(find(args.images, part)), wants, NAMES) for part in ("train", "t10k"))
        images, labels = tensors(train, args.train, args.device)
        held, moves, order = tensors(test, args.test, args.device), Moves(flip=True, crop=2), list[int]()

        def draw(count: int) -> dict[str, Tensor]:
            if len(order) < count:
                order[:] = torch.randperm(len(images), generator=drawn).tolist()
            chosen = [order.pop() for _ in range(min(count, len(order)))]
            return {"pixel_values": moves(images[chosen], drawn), "labels": labels[chosen]}

        about = {"train": train.manifest() | {"source": "train", "used": len(images)}}
        about |= {"test": test.manifest() | {"source": "t10k", "used": len(held[1])}}
        prepared = {
            "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
            "size": {"height": size, "width": size}, "image_mean": [MEAN], "image_std": [DEVIATION],
        }  # fmt: skip
        return Data(draw, lambda model: {"top1": accuracy(model, *held)}, about, prepared)

    return data


def detector() -> Any:
    """Scenes of 64 x 64 in 8 x 8 cells."""
    return Detector(DetectorConfig(image_size=64, widths=(16, 32, 64), id2label=dict(enumerate(CLASSES))))


def separator() -> Any:
    """A second of 8,000 samples in frames of 64."""
    return Separator(SeparatorConfig())


def drawn_examples(word: str) -> Callable[[argparse.Namespace, torch.Generator], Data]:
    """Scenes, or voices: 4,000 to train on and 500 to judge, or as many as is said."""

    def data(args: argparse.Namespace, drawn: torch.Generator) -> Data:
        model = KINDS[args.model].make()
        origin, work = InMemory(model.config), task_of(model, args.model)
        train = work.load(f"{word}:{args.train or 4000}", origin, model, 1, "calibration")
        test = work.load(f"{word}:{args.test or 500}", origin, model, 1, "evaluation")
        every = {name: t.to(args.device) for name, t in work.collate(train.rows).items()}

        def draw(count: int) -> dict[str, Tensor]:
            chosen = torch.randint(len(train.rows), (count,), generator=drawn)
            return {name: t[chosen.to(t.device)] for name, t in every.items()}

        def judge(model: Any) -> dict[str, float]:
            return work.measure(model, origin, test.rows, 50, Silent())

        return Data(draw, judge, {"train": train.manifest(), "test": test.manifest()}, None)

    return data


KINDS = {
    "detector": Kind(detector, drawn_examples("scenes"), rate=2e-3, batch=32),
    "separator": Kind(separator, drawn_examples("voices"), rate=2e-3, decay=0.0, batch=8),
    "resnet18": Kind(resnet18, fashion(32), rate=2e-3),
    "mobilenetv2": Kind(mobilenetv2, fashion(32), rate=3e-3),
    "deit": Kind(deit, fashion(28), rate=1e-3),
}


def main() -> None:
    """Train one, judge it, write it."""
    args = arguments()
    kind = KINDS[args.model]
    data = kind.data(args, torch.Generator().manual_seed(args.seed))
    torch.manual_seed(args.seed)
    model = kind.make().to(args.device)
    done = trained(model, data.draw, kind, args)
    measures = data.judge(model.eval())
    about = {
        "model": args.model, "held out": measures, **done, "seed": args.seed,
        "parameters": sum(p.numel() for p in model.parameters()), **data.about,
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor(),
        "versions": versions(),
    }  # fmt: skip
    with AtomicFolder(args.out) as partial:
        model.to("cpu").save_pretrained(partial)
        for name, what in (("preprocessor_config.json", data.prepared), ("made.json", about)):
            if what is not None:
                (partial / name).write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out}: {args.model}, {done['steps']:,} steps, {measures}")


def find(folder: Path, part: str) -> Path:
    """The IDX file of a part, ``train`` or ``t10k``, wherever the package keeps it."""
    found = sorted(folder.rglob(f"{part}-images-idx3-ubyte*"))
    if not found:
        raise SystemExit(f"{folder} holds no {part}-images-idx3-ubyte; apt-get install dataset-fashion-mnist")
    return found[0]


def tensors(found: LabelledImages, most: int | None, device: str) -> tuple[Tensor, Tensor]:
    """Prepared images and their labels, the first so many."""
    batch = together(found.rows[:most])
    return batch["pixel_values"].to(device), batch["labels"].to(device)


def trained(
    model: nn.Module, draw: Callable[[int], dict[str, Tensor]], kind: Kind, args: argparse.Namespace
) -> dict[str, Any]:
    """Train until the time is over, or the steps are; the rate rises over a tenth of either, then falls to 0.

    Returns:
        ``steps``, ``batch``, ``seconds`` and the last ``loss``.
    """
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": kind.decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer, step, batch = torch.optim.AdamW(groups, kind.rate), 0, args.batch or kind.batch
    model.train()
    started, loss = time.perf_counter(), torch.zeros(())
    with task(Bars(), args.steps or 1, "train") as bar:
        while (past := step / args.steps if args.steps else (time.perf_counter() - started) / args.seconds) < 1:
            for group in optimizer.param_groups:
                group["lr"] = kind.rate * min(10 * past + 1e-3, 0.5 + 0.5 * math.cos(math.pi * past))
            with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
                loss = model(**draw(batch)).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            bar.advance(1 if args.steps else 0)
    seconds = round(time.perf_counter() - started, 1)
    return {"steps": step, "batch": batch, "seconds": seconds, "loss": loss.item()}


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that get their class; float32."""
    right = 0
    for start in range(0, len(labels), PART):
        found = model(pixel_values=images[start : start + PART]).logits.argmax(-1)
        right += int((found == labels[start : start + PART]).sum())
    return right / len(labels)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(KINDS))
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--images", type=Path, default=FOLDER, help="where the IDX files are")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training")
    parser.add_argument("--steps", type=int, help="of training, in place of seconds")
    parser.add_argument("--batch", type=int, help="images of a step; left out: what suits the model")
    parser.add_argument("--train", type=int, help="at most so many training images")
    parser.add_argument("--test", type=int, help="the first so many test images; left out: all 10,000")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.seconds <= 0 or any(
        value is not None and value < 1 for value in (args.steps, args.batch, args.train, args.test)
    ):
        parser.error("--seconds, --steps, --batch, --train and --test are above 0")
    return args


if __name__ == "__main__":
    main()
