"""Image classifiers trained in few bits: OFQ, N2UQ, DyBit, DiffQ and pruning ternary, each against its own baseline.

    apt-get install dataset-fashion-mnist
    python benchmarks/image_qat.py resnet18 --device cuda --seeds 0 1 2 --out benchmarks/results/image_qat_resnet18.json
    python benchmarks/image_qat.py deit --device cuda --seeds 0 1 2 --out benchmarks/results/image_qat_deit.json

A float model of benchmarks/small_models.py learns Fashion-MNIST (60,000 images, mirrored and shifted), and is the
teacher where a row has one; every row begins with it and has as many updates. Rows run side by side; those that are
done are in ``--work``, and a second call goes on. Accuracy on the 10,000 test images, of the packed folder; bytes by
``nybble inspect``; ``flips`` are weights that went back to the code they had left, in a thousand of weights an update.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import small_models
from benchmarks.at_once import Request, Study, arguments

from nybble.checkpoint.account import inspect
from nybble.core.progress import Silent
from nybble.pipelines.load import load_with_origin
from nybble.training.recipe import load_training_recipe
from nybble.training.tasks import task_of

ENDS = load_training_recipe("n2uq").scheme.ignore
"""The first and the last layer, which stay in float on convolutional networks."""
TEACHER = {"logits": {"form": "ce"}}
COUNTED: dict[str, Any] = {"callbacks": {"oscillation": {}}}


@dataclass(frozen=True)
class Row:
    """A recipe, and what is changed of it; ``lr`` over that of the study."""

    recipe: str = "qat"
    scheme: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    lr: float = 1.0

    def asked(self, options: argparse.Namespace) -> Request:
        """On the training images."""
        train = small_models.find(options.images, "train")
        more = {"augment": "flip crop=2", "lr": options.lr * self.lr}
        return Request(recipe=self.recipe, data=train, scheme=self.scheme, options=self.options, settings=more)


def scheme(weights: str, inputs: str = "", ignore: tuple[str, ...] = ENDS) -> dict[str, Any]:
    """One line of weights, and one of inputs."""
    return {"weights": weights, **({"inputs": inputs} if inputs else {}), "ignore": list(ignore)}


LSQ: dict[str, Any] = {"learned": {"weights": "lsq", "inputs": {"lsq": {"unsigned": True}}}, "losses": TEACHER}
"""Learned scales on both sides, after a teacher."""
SIGNED = {"learned": {"weights": "lsq", "inputs": "lsq", "matmuls": "lsq"}}
"""The same on a transformer, where the scheme says what has a sign."""


def integers(bits: int) -> dict[str, Any]:
    """As LSQ has them."""
    return scheme(f"int{bits}_full channel scale=learned", f"int{bits} tensor static scale=learned")


def noisy(penalty: float) -> Row:
    """DiffQ at a price for the megabyte."""
    return Row(
        "diffq", scheme("uint8 scale=minmax(offset=true)", ignore=()),
        {"learned": {"weights": {"pseudo-noise": {"group": 8, "penalty": penalty}}}, "rates": {"bits": 10.0}},
    )  # fmt: skip


def pruned(**options: Any) -> Row:
    """Ternary from the first update, or in stages."""
    more = {} if options.pop("staged", True) else {"callbacks": {}, "learned": {"weights": {"pruned": {"share": 0.6}}}}
    return Row("pruning-ternary", scheme("ternary channel"), {**more, **options})


def book(bits: int) -> dict[str, Any]:
    """A nonuniform code book for the weights, integers for the inputs."""
    return scheme(f"nf{bits} channel scale=mse", f"int{bits} tensor static scale=learned")


ROWS: dict[str, dict[str, Row]] = {
    "resnet18": {
        **{f"LSQ {b}/{b}": Row(scheme=integers(b), options=LSQ) for b in (2, 3, 4)},
        "N2UQ 2/2": Row("n2uq"),
        "code book 2/2": Row(scheme=book(2), options=LSQ),
        "DyBit 4/4": Row("dybit-qat", scheme("dybit4 scale=mse", "dybit4 static scale=mse"), {"losses": TEACHER}),
        "INT4 4/4 of a tensor": Row(scheme=scheme("int4 scale=mse", "int4 static scale=mse"), options=LSQ),
        "ternary, staged": pruned(),
        "ternary at once": pruned(staged=False),
        "ternary, TWN": Row(
            scheme=scheme("ternary scale=mean(above=0.7)"),
            options={"learned": {"weights": {"statistics": {"threshold": 0.7}}}},
        ),
        **{f"DiffQ, {p:g} a MB": noisy(p) for p in (0.01, 0.1, 1.0)},
        "ste, 4 bits": Row(scheme=scheme("int4_full channel", ignore=())),
    },
    "mobilenetv2": {f"LSQ {b}/{b}": Row(scheme=integers(b), options=LSQ) for b in (4,)},
    "deit": {
        **{
            f"{name} {b}/{b}": Row("ofq", f"OFQ_W{b}A{b}", more)
            for b in (2, 3)
            for name, more in {
                "OFQ": {},
                "OFQ without annealing": COUNTED,
                "LSQ": {**COUNTED, **SIGNED},
                "LSQ, reset": {
                    "callbacks": {"oscillation": {"reset_every": 50, "reset_at": 8}}, **SIGNED,
                },
            }.items()
        },
    },
}  # fmt: skip


def begin(options: argparse.Namespace) -> None:
    """The float model, for as many updates as are asked."""
    words = ["small_models.py", options.kind, "--out", str(options.work / "float"), "--device", options.device]
    words += ["--steps", str(options.float_steps), "--images", str(options.images), "--batch", str(options.batch)]
    given, sys.argv = sys.argv, words
    try:
        small_models.main()
    finally:
        sys.argv = given


def judged(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy and loss on the test images, bytes, and flips where they were counted."""
    model, origin = load_with_origin(folder, dtype="float32", device=options.device)
    task = task_of(model, str(folder))
    source = str(small_models.find(options.images, "t10k"))
    rows = task.load(source, origin, model, 1, "evaluation").rows[: options.held]
    account = inspect(folder)
    found = {"bytes": account["total"], "bits_per_weight": account["bits_per_weight"], "images": len(rows)}
    return {**task.measure(model, origin, rows, 500, Silent()), **found, **_flips(folder)}


def _flips(folder: Path) -> dict[str, float]:
    """In a thousand of weights an update, over the run and in its last tenth."""
    file = folder / "training.json"
    told = json.loads(file.read_text()) if file.exists() else {}
    layers = told.get("callbacks", {}).get("oscillation", {}).get("layers", {})
    if not layers:
        return {}
    weights = sum(row["weights"] for row in layers.values())
    return {"flips": 1000 * sum(row["flips"] for row in layers.values()) / weights / told["steps"]}


def shown(result: dict[str, Any]) -> None:
    """A line a row: the mean of its seeds, and half their range."""
    exact = result["float"]
    print(f"{'float':28s} {100 * exact['accuracy']:6.2f} %                 {exact['bytes']:>12,} bytes")
    for name in dict.fromkeys(row.rpartition(" #")[0] for row in result["rows"]):
        rows = [found for row, found in result["rows"].items() if row.rpartition(" #")[0] == name]
        found = [100 * row["accuracy"] for row in rows]
        flips = [row["flips"] for row in rows if "flips" in row]
        print(
            f"{name:28s} {statistics.mean(found):6.2f} % ± {(max(found) - min(found)) / 2:4.2f} (n={len(found)})"
            f" {rows[0]['bytes']:>12,} bytes, {rows[0]['bits_per_weight']:.2f} bits, {rows[0]['seconds']:.0f} s"
            + (f", {statistics.mean(flips):.2f} flips" if flips else "")
        )


def own(parser: argparse.ArgumentParser) -> None:
    """What other studies haven't."""
    parser.add_argument("kind", choices=sorted(ROWS), help="which float model")
    parser.add_argument("--images", type=Path, default=small_models.FOLDER, help="where the IDX files are")


if __name__ == "__main__":
    options = arguments(__doc__ or "", "image_qat", "small_models", own, steps=3000, float_steps=3000)
    options.work = options.work / options.kind
    Study(
        script=__file__, doc=__doc__ or "", rows={name: row.asked for name, row in ROWS[options.kind].items()},
        begin=begin, judged=judged, shown=shown,
    ).main(options)  # fmt: skip
