"""TBT on a translator: English to Romanian and German with ternary and binary weights, beside TWN's and BWN's.

    python -m benchmarks.translations build/ternary_binary/data           # on Debian 12
    python benchmarks/ternary_binary.py --device cuda --seconds 240 --out benchmarks/results/ternary_binary.json

A BART of 4 + 4 layers of 256 translates strings of LibreOffice into the language that a source begins with (``<ro>``,
``<de>``); its float form is the teacher. Every row has the same updates and losses. TWN stands for ternary weights of
least error (which its threshold of 0.7 mean|W| comes near to) and BWN for binary ones, scales mean|W|, gradients
straight through; both with activations over their largest magnitude, in place of learned scales. Rows run side by side;
those that are done are in ``--work``, and a second call goes on. BLEU (sacrebleu) and nats a target token on held-out
strings, of the packed folder: 8-bit activations have a scale for a batch of them. Bytes by ``nybble inspect``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmarks.at_once import Request, Study, arguments
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig, PreTrainedTokenizerFast

from nybble.checkpoint.account import inspect
from nybble.core.files import atomic_write_text
from nybble.core.progress import Silent
from nybble.pipelines.load import load_with_origin
from nybble.training.recipe import load_training_recipe
from nybble.training.tasks import task_of
from nybble.two_sets import TWO_SETS, TwoSets

LANGUAGES = ("ro", "de")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", *(f"<{language}>" for language in LANGUAGES)]
TWN, BWN = ("ternary channel scale=least-squares",) * 2, ("binary channel scale=mean",) * 2
LARGEST = {"2": ("ternary tensor", "uternary tensor"), "1": ("binary tensor", "uint1 tensor")}
STRAIGHT: dict[str, Any] = {"statistics": {}}


@dataclass(frozen=True)
class Row:
    """A scheme, what learns weights (None: the recipe's), and whether the head shares the embeddings' few bits."""

    scheme: str | TwoSets
    weights: Any = None
    shared: bool = False

    def options(self) -> dict[str, Any]:
        """Of the recipe."""
        learned = load_training_recipe("ternary-binary").options["learned"]
        found = {"float_head": not self.shared}
        return found if self.weights is None else {**found, "learned": {**learned, "weights": self.weights}}

    def asked(self, options: argparse.Namespace) -> Request:
        """On the pairs."""
        scheme = self.scheme if isinstance(self.scheme, str) else self.scheme.to_dict()
        data = options.work / "train.jsonl"
        return Request(recipe="ternary-binary", data=data, scheme=scheme, options=self.options())


def mixed(weights: tuple[str, str], activations: str) -> TwoSets:
    """Weights of one, activations of a scheme of TBT."""
    found = TWO_SETS[activations]
    return TwoSets(*weights, found.signed, found.unsigned)


ROWS: dict[str, Row] = {
    "2-2-8, TBT": Row("TBT_W2A8"),
    "2-2-8, TWN": Row(mixed(TWN, "TBT_W2A8"), STRAIGHT),
    "2-2-2, TBT": Row("TBT_W2A2"),
    "2-2-2, TBT, head too": Row("TBT_W2A2", shared=True),
    "2-2-2, TBT as released": Row("TBT_W2A2", STRAIGHT),
    "2-2-2, TWN": Row(TwoSets(*TWN, *LARGEST["2"]), STRAIGHT),
    "2-2-2, TWN, activations of TBT": Row(mixed(TWN, "TBT_W2A2"), STRAIGHT),
    "2-2-2, TBT, activations of TWN": Row(TwoSets(*TWO_SETS["TBT_W2A2"][:2], *LARGEST["2"])),
    "1-1-8, TBT": Row("TBT_W1A8"),
    "1-1-8, BWN": Row(mixed(BWN, "TBT_W1A8"), STRAIGHT),
    "1-1-1, TBT": Row("TBT_W1A1"),
    "1-1-1, TBT, head too": Row("TBT_W1A1", shared=True),
    "1-1-1, BWN": Row(TwoSets(*BWN, *LARGEST["1"]), STRAIGHT),
}


# ------------------------------------------------------------------------------------------------------------- float
def tokenizer_of(texts: Iterator[str], size: int) -> Any:
    """Byte pairs, </s> behind each text."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False))
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    make: Any = PreTrainedTokenizerFast
    return make(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=SPECIAL[4:],
    )  # fmt: skip


def pairs(options: argparse.Namespace, part: str, language: str) -> list[dict[str, str]]:
    """Strings, their language in front of the source."""
    lines = (options.data / language / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{"source": f"<{language}> {row['source']}", "target": row["target"]} for row in rows]


def write(options: argparse.Namespace) -> None:
    """Examples of both languages, and of each what judges."""
    chosen = {"train": [row for language in LANGUAGES for row in pairs(options, "train", language)]}
    for language in LANGUAGES:
        held = pairs(options, "held", language)
        chosen[language] = held[:: max(1, len(held) // options.held)][: options.held]
    options.work.mkdir(parents=True, exist_ok=True)
    for name, rows in chosen.items():
        atomic_write_text(options.work / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def drawn(options: argparse.Namespace) -> tuple[Any, Any, list[dict[str, str]]]:
    """A model that has learned nothing, its tokenizer, and the examples, which are written."""
    write(options)
    rows = [json.loads(line) for line in (options.work / "train.jsonl").open(encoding="utf-8")]
    tokenizer = tokenizer_of((row[side] for row in rows for side in ("source", "target")), options.vocabulary)
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=options.width, encoder_layers=options.layers, decoder_layers=options.layers,
        encoder_ffn_dim=4 * options.width, decoder_ffn_dim=4 * options.width,
        encoder_attention_heads=options.width // 64, decoder_attention_heads=options.width // 64,
        max_position_embeddings=options.length, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=None, scale_embedding=True,
    )  # fmt: skip
    model: Any = BartForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=2, pad_token_id=0, eos_token_id=2, bos_token_id=1, max_new_tokens=options.length - 2
    )
    return model, tokenizer, rows


def begin(options: argparse.Namespace) -> None:
    """The examples, and the float model, trained on them."""
    model, tokenizer, rows = drawn(options)
    model.to(options.device)
    task = task_of(model, "the float model")
    cut: dict[str, Any] = {"truncation": True, "max_length": options.length}
    sides = {key: tokenizer([row[side] for row in rows], **cut)["input_ids"] for key, side in
             (("input_ids", "source"), ("labels", "target"))}  # fmt: skip
    examples = [{"input_ids": a, "labels": b, "pad": 0} for a, b in zip(*sides.values(), strict=True)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.float_lr, betas=(0.9, 0.98), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.float_lr, total_steps=options.float_steps)
    half = torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda")
    model.train()
    for _ in range(options.float_steps):
        chosen = torch.randint(len(examples), (options.batch,)).tolist()
        batch = {name: t.to(options.device) for name, t in task.collate([examples[i] for i in chosen]).items()}
        with half:
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    model.eval().cpu().save_pretrained(options.work / "float")
    tokenizer.save_pretrained(options.work / "float")


def judged(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """BLEU and loss on what is held out, by language, and bytes."""
    model, origin = load_with_origin(folder, dtype="float32", device=options.device)
    task, found = task_of(model, str(folder)), dict[str, Any]()
    for language in LANGUAGES:
        held = str(options.work / f"{language}.jsonl")
        rows = task.load(held, origin, model, options.length, "evaluation").rows
        found[language] = {**task.measure(model, origin, rows, 128, Silent()), "strings": len(rows)}
        found[language]["samples"] = task.samples(model, origin, rows)[:3]
    account = inspect(folder)
    return {**found, "bytes": account["total"], "bits_per_weight": account["bits_per_weight"]}


# ------------------------------------------------------------------------------------------------------------ study
def shown(result: dict[str, Any]) -> None:
    """A line a row."""
    for name, row in {"float": result["float"], **result["rows"]}.items():
        print(name.ljust(36), *(f"{to} {row[to]['bleu']:6.2f} BLEU {row[to]['nll']:6.3f} nats " for to in LANGUAGES),
              f"{row['bytes']:>12,} bytes, {row['bits_per_weight']:.2f} bits")  # fmt: skip


if __name__ == "__main__":
    study = Study(
        script=__file__, doc=__doc__ or "", rows={name: row.asked for name, row in ROWS.items()}, begin=begin,
        judged=judged, shown=shown,
    )  # fmt: skip
    options = arguments(
        study.doc, "ternary_binary", "benchmarks.translations", steps=400, length=48, layers=4, vocabulary=6000,
        float_steps=2500, float_lr=1e-3, held=256,
    )  # fmt: skip
    study.main(options)
