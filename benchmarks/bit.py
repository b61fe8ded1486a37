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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmarks.at_once import Request, Study, arguments
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from nybble.checkpoint.account import inspect
from nybble.core.progress import Silent
from nybble.pipelines.load import load_with_origin
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

    def asked(self, options: argparse.Namespace) -> Request:
        """On the descriptions."""
        return Request(
            recipe=self.recipe, data=options.data / "train.jsonl", scheme=self.scheme, options=self.options,
            stages=self.stages,
        )  # fmt: skip


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


# ------------------------------------------------------------------------------------------------------------ study
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


if __name__ == "__main__":
    study = Study(
        script=__file__, doc=__doc__ or "", rows={name: row.asked for name, row in ROWS.items()}, begin=begin,
        judged=judged, shown=shown, optimizer="weight_decay=0.01",
    )  # fmt: skip
    options = arguments(
        study.doc, "bit", "benchmarks.descriptions", steps=600, length=64, layers=6, vocabulary=8192, float_steps=2000,
        float_lr=5e-4,
    )  # fmt: skip
    study.main(options)
