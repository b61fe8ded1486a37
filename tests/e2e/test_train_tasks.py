"""``nybble train`` of a classifier and a translator, taught by all that a teacher has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tests.parts.training.test_text_tasks import BART, BERT, model, sentences
from tests.tiny import framed_tokenizer

import nybble
from nybble.core.errors import DataError, FileError, UsageError
from nybble.core.progress import Silent
from nybble.data.samples import InMemory
from nybble.nn.linear import QuantLinear
from nybble.pipelines.report import write_report
from nybble.pipelines.train import train
from nybble.training.settings import TrainSettings
from nybble.training.tasks import task_of

pytest.importorskip("accelerate", reason="the Trainer needs it: pip install 'nybble[train]'")

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
SETTINGS = TrainSettings(steps=8, batch=4, accumulate=1, seq_len=16, lr=5e-3, save_every=8, dtype="float32")
ALL = {"losses": {"task": 1, "logits": {"weight": 0.5, "temperature": 2}, "hidden": 0.1, "attention": 0.1}}


def saved(folder: Path, made: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A model with its tokenizer, and examples."""
    made.save_pretrained(folder / "model")
    framed_tokenizer().save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": folder / "model", "data": str(folder / "data.jsonl"), "judged_on": str(folder / "data.jsonl")}


def trained(folder: Path, given: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    return train(
        "qat", out=folder / "out", weights="int4 group=16", activations="int8 token", options=options,
        settings=SETTINGS, **given,
    )  # fmt: skip


def test_a_classifier(tmp_path: Path) -> None:
    texts = sentences(12)
    rows = [{"text": text, "label": ("sport", "weather")[i % 2]} for i, text in enumerate(texts)]
    given = saved(tmp_path, model("BertForSequenceClassification", "bert", BERT), rows)
    found = trained(tmp_path, given, ALL)
    before, after = (found["evaluation"]["models"][name] for name in ("before", "after"))
    assert after["loss"] < before["loss"] and after["accuracy"] >= before["accuracy"]
    assert found["task"] == {"name": "classification", "unit": "records", "shown": "accuracy"}
    page = (tmp_path / "out/report.html").read_text()
    assert "12 records" in page and "held out: Accuracy, share of the examples" in page
    record = json.loads((tmp_path / "out/training.json").read_text())
    (tmp_path / "alone").mkdir()
    tasks: list[tuple[Any, str]] = [({"name": "it"}, "task = "), (found["task"] | {"shown": "f1"}, "no losses before")]
    for task, message in tasks:
        (tmp_path / "alone/training.json").write_text(json.dumps({**record, "task": task}))
        with pytest.raises(FileError, match=message):
            write_report(tmp_path / "alone")
    (tmp_path / "alone/training.json").write_text(json.dumps(record))
    write_report(tmp_path / "alone")
    assert "12 records" in (tmp_path / "alone/report.html").read_text()  # without the model, and a page of its layers
    made, tokenizer = nybble.load(tmp_path / "out")
    assert isinstance(made, transformers.BertForSequenceClassification)
    assert any(isinstance(layer, QuantLinear) for layer in made.modules())
    kind, origin = task_of(made, "it"), InMemory(made.config, tokenizer)
    held = kind.load(given["data"], origin, made, 16, "evaluation").rows
    assert kind.measure(made, origin, held, 8, Silent()) == after  # with its own attention again


def test_a_translator(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu", reason="the judge: pip install sacrebleu")
    texts = sentences(8)
    rows = [{"source": text, "target": " ".join(text.split()[::-1])} for text in texts]
    given = saved(tmp_path, model("BartForConditionalGeneration", "bart", BART), rows)
    found = trained(tmp_path, given, ALL)
    models = found["evaluation"]["models"]
    assert models["after"]["nll"] < models["before"]["nll"] and "bleu" in models["after"]
    assert isinstance(nybble.load(tmp_path / "out")[0], transformers.BartForConditionalGeneration)


def test_data_of_another_task_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    given = saved(tmp_path, model("BertForSequenceClassification", "bert", BERT), [{"text": "ba", "label": "music"}])
    with pytest.raises(DataError, match=r"line 1: the model has no class 'music'"):
        trained(tmp_path, given, {})
    with pytest.raises(UsageError, match=r"data 'builtin' holds no records"):
        trained(tmp_path, {**given, "data": "builtin", "judged_on": None}, {})
    assert not [*tmp_path.glob("out*")]
