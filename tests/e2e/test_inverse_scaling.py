"""Inverse-scaling tasks of whole models: the harness's figures, two models compared, wrong requests."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import WORDS, save_tiny, tiny_model, tiny_tokenizer
from transformers import BertConfig, BertModel

import nybble
from nybble.core.errors import ModelError
from nybble.eval.harness import find_tasks, load_tasks, run_harness
from nybble.eval.inverse_scaling.examples import read_questions
from nybble.eval.inverse_scaling.scoring import score
from nybble.eval.inverse_scaling.trends import summary
from nybble.pipelines.inverse_scaling import run_inverse_scaling
from nybble.pipelines.request import build_recipe

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the harness: pip install 'nybble[lm-eval]'")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``float``, ``out`` (int3, a cache in few bits), and questions of unequal length in ``prize/neqa.jsonl``."""
    tmp, draw = tmp_path_factory.mktemp("inverse"), random.Random(0)
    save_tiny(tmp / "float")
    model, tokenizer = nybble.load(tmp / "float")
    nybble.quantize(model, build_recipe("rtn", weights="int3 group=16", kv="int4 token"))
    nybble.save(model, tmp / "out", tokenizer, form="native")
    (tmp / "prize").mkdir()
    rows = [
        {
            "prompt": " ".join(draw.choices(WORDS[3:], k=draw.randint(3, 16))),
            "classes": [" " + " ".join(draw.choices(WORDS[3:], k=draw.randint(1, 3))) for _ in range(3)],
            "answer_index": i % 3,
        }
        for i in range(24)
    ]
    (tmp / "prize" / "neqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp


def test_beside_the_float_model(place: Path, nybble_command: Any) -> None:
    """The quantized model's rows against the float one's; JSON has every question."""
    asked = ("eval", place / "out", "--inverse-scaling", "neqa", "--task-dir", place / "prize")
    code, out, err = nybble_command(*asked, "--reference", place / "float", "--json")
    assert code == 0, err
    found = json.loads(out)["tasks"]["neqa"]
    assert (found["lookalike"], found["questions"], found["expected"]) == (False, 24, [300])
    ours, theirs = found["models"]["model"], found["models"]["reference"]
    assert len(ours["rows"]) == 24
    change = ours["metrics"]["loss"] - theirs["metrics"]["loss"]
    assert ours["paired"]["loss_change"] == pytest.approx(change) != 0
    flips = sum(a["correct"] != b["correct"] for a, b in zip(ours["rows"], theirs["rows"], strict=True))
    assert ours["paired"]["flips"] == flips / 24
    code, out, _ = nybble_command(*asked, "--limit", "5")
    assert code == 0 and "neqa" in out and "5 rows" in out and "(chance 1.1)" in out


def test_a_cache_in_few_bits_is_asked_one_by_one(place: Path) -> None:
    """Padding would share a scale with what is asked."""
    here: dict[str, Any] = {"folder": place / "prize"}
    alone = run_inverse_scaling({"m": place / "out"}, ["neqa"], batch=1, **here)["tasks"]["neqa"]["models"]["m"]
    assert run_inverse_scaling({"m": place / "out"}, ["neqa"], **here)["tasks"]["neqa"]["models"]["m"] == alone


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_accuracies_are_the_harness_own(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its multiple choice, with nothing between prompt and class, as its port of these tasks has it."""
    if find_spec("datasets") is not None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    task = {
        "task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "neqa.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "target_delimiter": "",
        "doc_to_choice": "{{classes}}", "doc_to_target": "answer_index",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    (place / "prize" / "mine.yaml").write_text(json.dumps(task))
    model, tokenizer = tiny_model(dtype=torch.float32), tiny_tokenizer()  # of bfloat16 the harness's sums tie
    found = run_harness(model, tokenizer, load_tasks(find_tasks(["mine"], place / "prize")))
    theirs = {key: value for key, value in found["metrics"].items() if key.startswith("mine/")}
    asked = read_questions(place / "prize" / "neqa.jsonl")
    told = summary(asked, score(model, tokenizer, asked))
    assert (told["acc"], told["acc_norm"]) == (theirs["mine/acc"], theirs["mine/acc_norm"])
    assert told["acc_se"] == pytest.approx(theirs["mine/acc_stderr"])


WRONG = {
    "unknown inverse-scaling task 'nega'": ("--inverse-scaling", "nega"),
    "give one of them": ("--inverse-scaling", "neqa", "--tasks", "x"),
    "--data": ("--inverse-scaling", "neqa", "--data", "builtin"),
    "--num-fewshot isn't of": ("--inverse-scaling", "neqa", "--num-fewshot", "1"),
    "--seq-len isn't of": ("--inverse-scaling", "neqa", "--seq-len", "9"),
    "no task is named": ("--inverse-scaling", ","),
    "can't be read": ("--inverse-scaling", "nowhere.jsonl"),
    "put the prize's file": ("--inverse-scaling", "memo-trap"),
    "there is no folder nowhere": ("--inverse-scaling", "neqa", "--task-dir", "nowhere"),
}


@pytest.mark.parametrize("says", WRONG)
def test_wrong_requests(place: Path, nybble_command: Any, says: str) -> None:
    code, _, err = nybble_command("eval", place / "float", *WRONG[says])
    assert code == 2 or "can't be read" in says or "no folder" in says
    assert says in " ".join(err.split())


def test_other_models_are_refused(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=64, num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2)
    BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="ask causal language models"):
        run_inverse_scaling({"m": tmp_path / "bert"}, ["neqa"])
