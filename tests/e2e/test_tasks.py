"""Tasks of lm-evaluation-harness: its own figures, from local files, for every model that nybble evaluates."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import WORDS, save_tiny, tiny_tokenizer
from transformers import BertConfig, BertModel

import nybble
from nybble.core import versions
from nybble.core.errors import DataError, ModelError, UsageError
from nybble.eval import harness
from nybble.pipelines.request import build_recipe
from nybble.pipelines.tasks import run_tasks

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the harness: pip install 'nybble[lm-eval]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own
ROOT = Path(__file__).parents[2]
TASKS: dict[str, dict[str, Any]] = {
    "choose": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}], "fewshot_split": "test",
    },
    "continue": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["ba"], "max_gen_toks": 9, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}, {"metric": "ter"}],
    },
    "read": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}  # fmt: skip
"""One of each way to ask. ``ter`` has no formula for its standard error: the harness prints while it resamples."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``float``, ``out`` (int4 with a KV cache in few bits), and ``tasks`` over 12 questions of unequal length."""
    tmp, draw = tmp_path_factory.mktemp("tasks"), random.Random(0)
    save_tiny(tmp / "float")
    write_quantized(tmp / "float", tmp / "out", weights="int4 group=16", kv="int4 token")
    (tmp / "tasks").mkdir()
    rows = [
        {
            "question": " ".join(draw.choices(WORDS[3:], k=draw.randint(3, 16))),
            "choices": [" ".join(draw.choices(WORDS[3:], k=draw.randint(1, 3))) for _ in range(3)], "answer": i % 3,
        }
        for i in range(12)
    ]  # fmt: skip
    (tmp / "tasks" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}, "test_split": "test"}
        (tmp / "tasks" / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **task}))
    return tmp


def write_quantized(source: Path, out: Path, **scheme: str) -> None:
    """A folder in nybble's own form."""
    model, tokenizer = nybble.load(source)
    nybble.quantize(model, build_recipe("rtn", **scheme))
    nybble.save(model, out, tokenizer, form="native")


@pytest.fixture(autouse=True)
def _no_cache_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("datasets") is not None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # of the harness, when it resamples


def theirs(place: Path, folder: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, float]:
    """What the harness says when it loads the folder itself, with transformers."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(place / "tasks")
    found = lm_eval.simple_evaluate(
        "hf", {"pretrained": str(place / folder), "dtype": "bfloat16", "device": "cpu"}, tasks=list(TASKS),
        task_manager=TaskManager(include_path=".", include_defaults=False), bootstrap_iters=harness.RESAMPLES,
        **options,
    )  # fmt: skip
    return {
        f"{task}/{key.removesuffix(',none')}": value
        for task, numbers in found["results"].items()
        for key, value in numbers.items()
        if "," in key and value != "N/A"
    }


@needs_harness
@pytest.mark.parametrize("folder", ["float", "out"])
def test_the_figures_are_the_harness_own(
    place: Path, folder: str, nybble_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches or one by one, with examples in front or not; read from anywhere; one JSON object is printed."""
    before = random.getstate(), torch.get_rng_state(), Path.cwd(), logging.getLogger("lm_eval").level
    arguments = ("eval", place / folder, "--tasks", "choose,continue,rea*", "--task-dir", place / "tasks")
    code, out, err = nybble_command(*arguments, "--json", "--num-fewshot", "2", "--batch-size", "4")
    assert code == 0, err
    found = json.loads(out)
    assert (random.getstate(), Path.cwd(), logging.getLogger("lm_eval").level) == (before[0], *before[2:])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert found["data"]["tasks"]["choose"]["samples"] == 12 and found["data"]["tasks"]["choose"]["num_fewshot"] == 2
    assert found["metrics"] == pytest.approx(theirs(place, folder, monkeypatch, num_fewshot=2, batch_size=1), rel=1e-3)
    assert {"choose/acc_stderr", "continue/ter_stderr", "read/word_perplexity"} <= found["metrics"].keys()


@needs_harness
def test_quantization_shows_beside_the_float_model(place: Path, nybble_command: Any, tmp_path: Path) -> None:
    arguments = (
        "eval",
        place / "out",
        "--tasks",
        "read",
        "--task-dir",
        place / "tasks",
        "--reference",
        place / "float",
    )
    found = json.loads(nybble_command(*arguments, "--limit", "5", "--json")[1])
    name = "read/word_perplexity"
    assert found["data"]["tasks"]["read"]["samples"] == 5
    assert found["metrics"][name] != found["reference"][name] == pytest.approx(found["metrics"][name], rel=0.5)
    code, out, _ = nybble_command(*arguments)
    assert code == 0 and "read/word_perplexity" in out and "reference" in out and "read: 12 questions" in out
    # a longer prompt than the model may see is cut, by seq_len as by its config
    short = run_tasks({"model": place / "float"}, ["read"], place / "tasks", seq_len=4)
    assert short["models"]["model"][name] != found["reference"][name]


@needs_harness
def test_a_batch_that_would_share_a_scale_is_one_prompt(place: Path, tmp_path: Path) -> None:
    write_quantized(place / "float", tmp_path / "shared", weights="int8 channel", activations="int8 tensor")
    one, many, single = (
        run_tasks({"model": folder}, ["choose"], place / "tasks", batch_size=size)
        for folder, size in ((tmp_path / "shared", None), (tmp_path / "shared", 6), (tmp_path / "shared", 1))
    )
    assert one == single and not one["notes"]
    assert "model.layers.0" in many["notes"]["model"] and "int8" in many["notes"]["model"]


@needs_harness
def test_what_cannot_be_asked_is_refused(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.pipelines.tasks.load_with_origin", None)  # nothing is read before
    tasks, model = place / "tasks", {"model": place / "float"}
    with monkeypatch.context() as patch:
        patch.setattr("nybble.pipelines.tasks.described_with_origin", None)  # nor looked for
        patch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "manager.py"))  # not its 14,000 tasks
        said = (
            r"has a task 'chose', 'raed'\. By 'chose', did you mean 'choose'\? By 'raed', did you mean 'read'\? Tasks"
        )
        with pytest.raises(UsageError, match=said):
            run_tasks(model, ["chose", "continue", "raed"], tasks)
    broken = {"output_type": "multiple_choice", "test_split": "test", "dataset_path": "json", "task": "broken"}
    (tmp_path / "broken.yaml").write_text(json.dumps({**broken, "dataset_kwargs": {"data_files": "no.jsonl"}}))
    with pytest.raises(DataError, match=r"task 'broken' can't be read: .*no\.jsonl"):
        run_tasks(model, ["broken"], tmp_path)
    with pytest.raises(nybble.NybbleError, match="there is no folder"):
        run_tasks(model, ["choose"], tmp_path / "none")
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=64, num_hidden_layers=1, **sizes)).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="is a BertModel, which makes no text"):
        run_tasks({"model": tmp_path / "bert"}, ["choose"], tasks)


def test_options_of_tasks_and_of_data_do_not_mix(place: Path, nybble_command: Any) -> None:
    for arguments, said in {
        ("--tasks", "choose", "--data", "builtin"): "leave out --data",
        ("--tasks", "choose", "--samples", "3"): r"leave out --samples (--limit says how much)",
        ("--limit", "3"): "--limit is of tasks",
        ("--chat",): "--chat is of tasks",
        ("--tasks", "choose", "--limit", "0"): "limit is 0",
    }.items():
        code, _, err = nybble_command("eval", place / "float", *arguments)
        assert code == 2 and said in err, err


@pytest.mark.parametrize(
    ("installed", "said"), [(None, "need EleutherAI"), ("0.4.9.2", r"lm-eval 0\.4\.9\.2 is too old")]
)
def test_without_the_package_the_install_line_is_said(
    place: Path, monkeypatch: pytest.MonkeyPatch, installed: str | None, said: str
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(versions, "version", version)
    harness.harness_version.cache_clear()
    try:
        with pytest.raises(UsageError, match=rf"{said}.*pip install 'nybble\[lm-eval\]'"):
            run_tasks({"model": place / "float"}, ["choose"], place / "tasks")
    finally:
        harness.harness_version.cache_clear()


@needs_harness
def test_the_example_tasks_run(place: Path) -> None:
    found = run_tasks({"m": place / "float"}, ["packages", "packages_text"], ROOT / "examples" / "tasks", limit=4)
    assert found["models"]["m"].keys() >= {"packages/acc", "packages_text/bits_per_byte"}
    rows = [json.loads(line) for line in (ROOT / "examples/tasks/packages.jsonl").read_text().splitlines()]
    assert len(rows) == 96 and all(len(set(row["choices"])) == 4 and 0 <= row["answer"] < 4 for row in rows)
