"""Small networks trained in few bits: OFQ, N2UQ, DyBit, DiffQ and pruning ternary, each against its own baseline.

    apt-get install dataset-fashion-mnist
    python benchmarks/small_qat.py resnet18 --device cuda --seeds 0 1 2 --out benchmarks/results/small_qat_resnet18.json

and so for ``mobilenetv2``, ``deit``, ``detector``, ``separator`` and ``lm`` (``--ladder``: what benchmarks/ladder
wrote; its llama of 3 million parameters).

A float model of benchmarks/small_models.py learns Fashion-MNIST (60,000 images, mirrored and shifted), drawn scenes or
mixtures of two drawn voices (4,000 of them), and is the teacher where a row has one; every row begins with it and has
as many updates. Rows run side by side; those that are done are in ``--work``, and a second call goes on. Judged is the
packed folder: accuracy on the 10,000 test images, average precision on 500 scenes, SI-SDR of 500 mixtures, perplexity
of held-out text. Bytes by ``nybble inspect``; ``flips`` are weights that went back to the code they had left, in a
thousand of weights an update.
"""

from __future__ import annotations

import argparse
import json
import shutil
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

IMAGES = ("resnet18", "mobilenetv2", "deit")
DRAWN = {"detector": "scenes", "separator": "voices"}
SHOWN = {"accuracy": 100, "map50": 100, "si_sdr": 1, "ppl": 1}
"""Measures that are printed, and how many times over."""
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
        """On the examples that train."""
        drawn = options.kind not in IMAGES
        more = {"lr": options.lr * self.lr, **({} if drawn else {"augment": "flip crop=2"})}
        data = Path(examples(options, "train"))
        return Request(recipe=self.recipe, data=data, scheme=self.scheme, options=self.options, settings=more)


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


def noisy(penalty: float, ignore: tuple[str, ...] = ()) -> Row:
    """DiffQ at a price for the megabyte."""
    return Row(
        "diffq", scheme("uint8 scale=minmax(offset=true)", ignore=ignore),
        {"learned": {"weights": {"pseudo-noise": {"group": 8, "penalty": penalty}}}, "rates": {"bits": 10.0}},
    )  # fmt: skip


def straight(bits: int, ignore: tuple[str, ...] = ()) -> Row:
    """Integers a channel, gradients straight through."""
    return Row(scheme=scheme(f"int{bits}_full channel", ignore=ignore))


def sizes(*ignore: str) -> dict[str, Row]:
    """Bytes against quality."""
    rows = {f"DiffQ, {p:g} a MB": noisy(p, ignore) for p in (0.1, 1.0, 10.0)}
    return rows | {f"ste, {bits} bits": straight(bits, ignore) for bits in (8, 4, 3, 2)}


def ternary(ignore: tuple[str, ...] = ENDS) -> dict[str, Row]:
    """Pruned and made ternary in stages, or from the first update; and TWN's threshold."""
    once = {"callbacks": {}, "learned": {"weights": {"pruned": {"share": 0.6}}}}
    share = {"learned": {"weights": {"statistics": {"threshold": 0.7}}}}
    return {
        "ternary, staged": Row("pruning-ternary", scheme("ternary channel", ignore=ignore)),
        "ternary at once": Row("pruning-ternary", scheme("ternary channel", ignore=ignore), once),
        "ternary, TWN": Row(scheme=scheme("ternary scale=mean(above=0.7)", ignore=ignore), options=share),
    }


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
        **ternary(),
        **{f"DiffQ, {p:g} a MB": noisy(p) for p in (0.01, 0.1, 1.0)},
        "ste, 4 bits": straight(4),
    },
    "mobilenetv2": {f"LSQ {b}/{b}": Row(scheme=integers(b), options=LSQ) for b in (4,)},
    "detector": ternary(("net.0.down.0", "net.4")),
    "separator": sizes(),
    "lm": sizes("lm_head"),
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


def examples(options: argparse.Namespace, part: str) -> str:
    """What trains, or what judges."""
    if options.kind in DRAWN:
        return f"{DRAWN[options.kind]}:{4000 if part == 'train' else 500}"
    if options.kind == "lm":
        text = "calibration" if part == "train" else "held-out"
        return str(options.ladder / "texts" / f"{text}.jsonl.xz")
    return str(small_models.find(options.images, part))


def begin(options: argparse.Namespace) -> None:
    """The float model, for as many updates as are asked."""
    if options.kind == "lm":
        shutil.copytree(options.ladder / "models" / "llama-3m", options.work / "float")
        return
    words = ["small_models.py", options.kind, "--out", str(options.work / "float"), "--device", options.device]
    words += ["--steps", str(options.float_steps), "--images", str(options.images)]
    words += ["--batch", str(options.batch)] if options.kind in IMAGES else []
    given, sys.argv = sys.argv, words
    try:
        small_models.main()
    finally:
        sys.argv = given


def judged(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What the task measures on the examples that judge, bytes, and flips where they were counted."""
    model, origin = load_with_origin(folder, dtype="float32", device=options.device)
    task = task_of(model, str(folder))
    rows = task.load(examples(options, "t10k"), origin, model, options.length or 1, "evaluation").rows[: options.held]
    account = inspect(folder)
    found = {"bytes": account["total"], "bits_per_weight": account["bits_per_weight"], "examples": len(rows)}
    together = 500 if options.kind in IMAGES else 50
    return {**task.measure(model, origin, rows, together, Silent()), **found, **_flips(folder)}


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
    measure = next(name for name in SHOWN if name in exact)
    print(f"{'float':28s} {SHOWN[measure] * exact[measure]:6.2f} {measure:10s}            {exact['bytes']:>12,} bytes")
    for name in dict.fromkeys(row.rpartition(" #")[0] for row in result["rows"]):
        rows = [found for row, found in result["rows"].items() if row.rpartition(" #")[0] == name]
        found = [SHOWN[measure] * row[measure] for row in rows]
        flips = [row["flips"] for row in rows if "flips" in row]
        print(
            f"{name:28s} {statistics.mean(found):6.2f} ± {(max(found) - min(found)) / 2:4.2f} (n={len(found)})"
            f" {rows[0]['bytes']:>12,} bytes, {rows[0]['bits_per_weight']:.2f} bits, {rows[0]['seconds']:.0f} s"
            + (f", {statistics.mean(flips):.2f} flips" if flips else "")
        )


def own(parser: argparse.ArgumentParser) -> None:
    """What other studies haven't."""
    parser.add_argument("kind", choices=sorted(ROWS), help="which float model")
    parser.add_argument("--images", type=Path, default=small_models.FOLDER, help="where the IDX files are")
    parser.add_argument("--ladder", type=Path, default=Path("build/ladder"), help="what benchmarks/ladder wrote")


if __name__ == "__main__":
    options = arguments(__doc__ or "", "small_qat", "small_models", own, steps=3000, float_steps=3000)
    options.work = options.work / options.kind
    options.length = 256 if options.kind == "lm" else options.length
    options.batch = {"detector": 32, "separator": 8, "lm": 32}.get(options.kind, options.batch)
    Study(
        script=__file__, doc=__doc__ or "", rows={name: row.asked for name, row in ROWS[options.kind].items()},
        begin=begin, judged=judged, shown=shown,
    ).main(options)  # fmt: skip
