"""BiT on an encoder: classes of package descriptions in one bit, in two stages and one, and with each part taken away.

    python -m benchmarks.descriptions build/bit/data                      # on Debian 12
    python benchmarks/bit.py --device cuda --seconds 240 --out benchmarks/results/bit.json

A BERT of 6 layers of 256, with a WordPiece vocabulary of the texts, learns which section a Debian package is in. Its
float form is the teacher (of the first stage). Every row has as many updates: two stages have half of them each. Rows
run side by side; those that are done are in ``--work``, and a second call goes on. Accuracy on held-out packages, of
the packed folder; bytes by ``nybble inspect``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmarks.at_once import file_of, run
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from nybble.checkpoint.account import inspect
from nybble.core.files import atomic_write_json
from nybble.core.progress import Silent
from nybble.core.versions import versions
from nybble.pipelines.load import load_with_origin
from nybble.pipelines.train import train
from nybble.training.recipe import load_training_recipe
from nybble.training.tasks import task_of
from nybble.two_sets import TWO_SETS

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@dataclass(frozen=True)
class Row:
    """A recipe, and what is changed of it; ``stages`` trainings share the updates."""

    recipe: str = "bit"
    scheme: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    stages: int = 2


def one_set(name: str) -> dict[str, Any]:
    """A scheme with signed values everywhere."""
    made = TWO_SETS[name]
    return made._replace(unsigned=made.signed).to_dict()


def changed(role: str, part: Any) -> dict[str, Any]:
    """The recipe's learned parts, with another one for a role."""
    return {**load_training_recipe("bit").options["learned"], role: part}


ONE: dict[str, Any] = {"stages": [], "teacher": "float"}
STILL = {"learned": {**changed("inputs", "ste"), "matmuls": "ste"}, "rates": {}}
TENSOR = {"learned": changed("inputs", {"elastic": {"threshold": "tensor"}})}
ROWS: dict[str, Row] = {
    "1-1-1, two stages": Row(),
    "1-1-1, one stage": Row(options=ONE, stages=1),
    "1-1-1, two stages, float teacher": Row(options={"teacher": "float"}),
    "1-1-1, two stages, signed set everywhere": Row(
        scheme=one_set("BIT_W1A1"), options={"stages": [{"scheme": one_set("BIT_W1A2")}]}
    ),
    "1-1-1, two stages, scales and thresholds stay": Row(options=STILL),
    "1-1-1, two stages, threshold of a tensor": Row(options=TENSOR),
    "1-1-1, two stages, GELU": Row(options={"activation": ""}),
    "1-1-1, two stages, labels for a teacher": Row(options={"losses": {"task": 1.0}, "teacher": "float"}),
    "1-1-2": Row(scheme="BIT_W1A2", options=ONE, stages=1),
    "1-1-4": Row(scheme="BIT_W1A4", options=ONE, stages=1),
    "2-2-2, TBT": Row("ternary-binary", stages=1),
    "2-2-8, TBT": Row("ternary-binary", "TBT_W2A8", stages=1),
    "1-1-8, TBT": Row("ternary-binary", "TBT_W1A8", stages=1),
}


# ------------------------------------------------------------------------------------------------------------- float
def tokenizer_of(texts: Iterator[str], size: int) -> Any:
    """WordPiece, lower case, [CLS] before and [SEP] behind."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=made, **names)


def begin(options: argparse.Namespace) -> None:
    """The float model, trained on the labels."""
    folder, device = options.work / "float", torch.device(options.device)
    rows = [json.loads(line) for line in (options.data / "train.jsonl").open(encoding="utf-8")]
    tokenizer = tokenizer_of((row["text"] for row in rows), options.vocabulary)
    labels = json.loads((options.data / "labels.json").read_text())
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=options.width, intermediate_size=4 * options.width,
        num_hidden_layers=options.layers, num_attention_heads=options.width // 64,
        max_position_embeddings=options.length, pad_token_id=0, num_labels=len(labels),
        id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)},
    )  # fmt: skip
    model: Any = BertForSequenceClassification(config).to(device)
    encoded = tokenizer(
        [row["text"] for row in rows], truncation=True, max_length=options.length, padding="max_length",
        return_tensors="pt", return_token_type_ids=False,
    )  # fmt: skip
    ids, mask = encoded["input_ids"].to(device), encoded["attention_mask"].to(device)
    targets = torch.tensor([config.label2id[row["label"]] for row in rows], device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.float_lr, weight_decay=0.01)
    steps = options.float_steps
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.float_lr, total_steps=steps, pct_start=0.1)
    half = torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda")
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(rows), (options.batch,), device=device)
        with half:
            logits = model(input_ids=ids[chosen], attention_mask=mask[chosen]).logits
        functional.cross_entropy(logits.float(), targets[chosen]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    model.eval().cpu().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def judged(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy and loss on what is held out, and bytes."""
    model, origin = load_with_origin(folder, dtype="float32", device=options.device)
    task = task_of(model, str(folder))
    rows = task.load(str(options.data / "held.jsonl"), origin, model, options.length, "evaluation").rows
    rows = rows[: options.held]
    metrics = task.measure(model, origin, rows, 256, Silent())
    account = inspect(folder)
    found = {"bytes": account["total"], "bits_per_weight": account["bits_per_weight"], "records": len(rows)}
    return {**metrics, **found}


# -------------------------------------------------------------------------------------------------------------- rows
def one(name: str, options: argparse.Namespace) -> None:
    """A row, in a process of its own."""
    words, _, seed = name.rpartition(" #")
    row, began = ROWS[words], time.monotonic()
    out = file_of(options.work, name).with_suffix("")
    settings = {
        "steps": options.steps // row.stages, "batch": options.batch, "accumulate": 1, "seq_len": options.length,
        "lr": options.lr, "device": options.device, "dtype": "bfloat16" if options.device == "cuda" else "float32",
        "checkpointing": False, "save_every": 200, "seed": int(seed), "resume": True,
        "optimizer": f"torch.AdamW weight_decay=0.01{' fused=true' * (options.device == 'cuda')}",
    }  # fmt: skip
    if not out.exists():
        train(
            row.recipe, options.work / "float", out, str(options.data / "train.jsonl"), scheme=row.scheme,
            options=row.options, settings=settings, form="native",
        )  # fmt: skip
    told = json.loads((out / "training.json").read_text())
    curve = told["curve"][:: max(1, len(told["curve"]) // 60)]
    found = {**judged(out, options), "steps": told["steps"], "curve": curve}
    atomic_write_json(file_of(options.work, name), {**found, "seconds": round(time.monotonic() - began, 1)})


def main() -> None:
    """Train the float model, then the rows at once; print and write."""
    options = parsed()
    if options.row:
        one(options.row, options)
        return
    ends = time.monotonic() + options.seconds
    if not (options.work / "float" / "config.json").exists():
        began = time.monotonic()
        begin(options)
        print(f"float model: {time.monotonic() - began:.0f} s", flush=True)
    if not file_of(options.work, "float").exists():
        file_of(options.work, "float").parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(file_of(options.work, "float"), judged(options.work / "float", options))
    exact = json.loads(file_of(options.work, "float").read_text())
    wanted = [name for name in ROWS if not options.rows or any(word in name for word in options.rows)]
    names = [f"{name} #{seed}" for seed in options.seeds for name in wanted]
    done = run(__file__, names, options.work, workers=options.workers, ends=ends, device=options.device)
    keys = ("steps", "batch", "lr", "length", "layers", "width", "vocabulary", "float_steps", "float_lr")
    result = {
        "what": (__doc__ or "").split("\n")[0], "versions": versions(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "training": {key: getattr(options, key) for key in keys}, "float": exact, "rows": done,
    }  # fmt: skip
    shown(result)
    if options.out:
        atomic_write_json(options.out, result)


def shown(result: dict[str, Any]) -> None:
    """A line a row: the mean of its seeds, and half their range."""
    exact = result["float"]
    print(f"{'float':46s} {100 * exact['accuracy']:6.2f} %                 {exact['bytes']:>12,} bytes")
    for name in dict.fromkeys(row.rpartition(" #")[0] for row in result["rows"]):
        rows = [found for row, found in result["rows"].items() if row.rpartition(" #")[0] == name]
        found = [100 * row["accuracy"] for row in rows]
        print(
            f"{name:46s} {statistics.mean(found):6.2f} % ± {(max(found) - min(found)) / 2:4.2f} (n={len(found)})"
            f" {rows[0]['bytes']:>12,} bytes, {rows[0]['bits_per_weight']:.2f} bits, {rows[0]['seconds']:.0f} s"
        )


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/bit/data"), help="of benchmarks.descriptions")
    parser.add_argument("--work", type=Path, default=Path("build/bit/work"), help="what is done, to go on from")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rows", nargs="*", default=[], help="words of the rows that are wanted")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--workers", type=int, default=14, help="rows at a time")
    parser.add_argument("--steps", type=int, default=600, help="updates of a row")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--float-steps", type=int, default=2000)
    parser.add_argument("--float-lr", type=float, default=5e-4)
    parser.add_argument("--held", type=int, help="records that judge; left out: all")
    parser.add_argument("--seconds", type=float, default=1e9, help="end rows that aren't done by then")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
