"""``nybble train`` with recipes whose result is a model: stages, teachers, texts of its own, scales alone."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from tests.e2e.test_train import _Stops, files
from tests.tiny import WORDS, logits, save_tiny, tiny_tokenizer

import nybble
from nybble.checkpoint.account import inspect
from nybble.cli import main
from nybble.core.errors import FileError, LearningError, NybbleError, SchemeError, UsageError
from nybble.core.progress import Silent
from nybble.nn.kv_model import use_quantized_cache
from nybble.nn.linear import QuantLinear
from nybble.nn.packed import Packed
from nybble.pipelines.report import write_report
from nybble.pipelines.train import train
from nybble.qtensor.block import BlockQTensor
from nybble.training.objective import Objective
from nybble.training.settings import TrainSettings

loop = pytest.importorskip("nybble.training.loop", reason="needs accelerate, which nybble's extra 'train' brings")

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
SETTINGS = TrainSettings(steps=3, batch=1, accumulate=2, seq_len=16, lr=0.02, save_every=1, dtype="float32")
TAUGHT = {"losses": {"task": 1, "logits": {"weight": 1}}}
STAGES = {**TAUGHT, "stages": [{"scheme": {"weights": "int8 group=16"}}], "teacher": "stage"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and examples."""
    made = tmp_path_factory.mktemp("train")
    save_tiny(made / "model", dtype=torch.float32)
    rng = random.Random(0)
    with (made / "data.jsonl").open("w") as file:
        for _ in range(6):
            words = rng.choices(WORDS[3:13], k=rng.randint(2, 5))
            file.write(json.dumps({"instruction": " ".join(words), "output": " ".join(words[::-1])}) + "\n")
    nybble.quantize(str(made / "model"), "rtn", out=made / "packed", weights="int4 group=16", form="native")
    return made


def run(
    folder: Path, out: Path, recipe: str = "qat", settings: TrainSettings = SETTINGS, **more: Any
) -> dict[str, Any]:
    given = {"model": folder / "model", "data": str(folder / "data.jsonl"), **more}
    if recipe == "qat":
        given = {"weights": "int4 group=16", "activations": "int8 token", **given}
    return train(recipe, out=out, settings=settings, **given)


def layers(model: Any) -> dict[str, BlockQTensor]:
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear) and isinstance(layer.weight, Packed):
            packed = layer.weight.qtensor()
            assert isinstance(packed, BlockQTensor)
            found[name] = packed
    return found


def test_all_weights_train_and_what_is_written_is_what_was_measured(folder: Path, tmp_path: Path) -> None:
    found = run(folder, tmp_path / "out", judged_on=str(folder / "data.jsonl"), options=TAUGHT, kv="int4 token")
    models = found["evaluation"]["models"]
    assert [*models] == ["float", "before", "after"] and models["after"]["nll"] < models["before"]["nll"]
    assert models["float"]["nll"] != models["before"]["nll"]
    model, tokenizer = nybble.load(tmp_path / "out")
    task = loop.TASKS.get("language")
    rows = task.load(str(folder / "data.jsonl"), _Origin(tokenizer), model, 16, "evaluation").rows
    assert task.measure(model, _Origin(tokenizer), rows, 8, Silent()) == models["after"]
    use_quantized_cache(model, None)
    assert task.measure(model, _Origin(tokenizer), rows, 8, Silent()) != models["after"]
    rounded = layers(nybble.load(folder / "packed")[0])
    assert all(not torch.equal(q.codes, rounded[name].codes) for name, q in layers(model).items())
    pages_of(tmp_path / "out", found)


def pages_of(out: Path, found: dict[str, Any]) -> None:
    """Of the run and of its layers, the same when made again; what they show, and what each file counts as."""
    steps = [loss for _, loss in found["curve"]]
    sums = [task + logits for task, logits in zip(found["losses"]["task"], found["losses"]["logits"], strict=True)]
    assert steps == pytest.approx(sums, abs=1e-4) and found["stages"] == [3]
    for row in json.loads((out / "nybble.json").read_text())["layers"]:
        assert row["weights"].startswith("int4 group=16") and 0 < row["learned"]["codes"] < 1 and row["sqnr"] > 5
        assert len(row["learned"]["scales"]) == 3 and row["inputs"] == "int8 token"
        assert sum(row["weight_picture"]["counts"]) == row["shape"][0] * row["shape"][1]
    before = {name: (out / name).read_bytes() for name in ("report.html", "layers.html")}
    made = write_report(out)
    assert made["layers_report"] == str(out / "layers.html") and made["updates"] == 3
    assert {name: (out / name).read_bytes() for name in before} == before
    assert b'href="layers.html"' in before["report.html"] and b'href="report.html"' in before["layers.html"]
    assert b'class="histogram"' in before["report.html"] and b'"thresholds":[[' in before["layers.html"]
    write_report(out, out.with_name("alone.html"))
    assert b"layers.html" not in out.with_name("alone.html").read_bytes()
    sizes = inspect(out)
    assert sum(sizes["bytes"].values()) == sizes["total"]
    reports = ("nybble.json", "README.md", "training.json", "times.json", *before)
    assert sizes["bytes"]["report"] == sum((out / name).stat().st_size for name in reports)


class _Origin:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def tokenizer(self) -> Any:
        return self._tokenizer


@pytest.mark.parametrize("behind", [2, 4])
def test_stages_are_gone_on_with_behind_a_kill(folder: Path, tmp_path: Path, behind: int) -> None:
    """In the first stage, and in the second, whose teacher and start are the first one's."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    first = run(folder, whole, options=STAGES)
    with pytest.raises(KeyboardInterrupt):
        run(folder, out, options=STAGES, progress=_Stops(behind))
    assert (tmp_path / "out.partial/checkpoints/stage-0.json").exists() == (behind > 3)
    second = run(folder, out, options=STAGES, settings=replace(SETTINGS, resume=True))
    assert files(out, whole) == files(whole, whole) and first["steps"] == 6 == len(second["curve"])
    assert second["stages"] == [3, 3] and len(second["losses"]["logits"]) == 6
    assert [step for step, _ in second["curve"]] == [1, 2, 3, 4, 5, 6]
    assert (out / "report.html").read_text().count('class="border"') == 3  # in the curves of the sum and of both parts
    plain = run(folder, tmp_path / "plain", options=TAUGHT)
    assert plain["curve"][0][1] != first["curve"][3][1]


def test_scales_alone_train_and_codes_stay(folder: Path, tmp_path: Path) -> None:
    found = run(
        folder, tmp_path / "out", "distill", model=folder / "packed", teacher=str(folder / "model"),
        judged_on=str(folder / "data.jsonl"),
    )  # fmt: skip
    before, after = layers(nybble.load(folder / "packed")[0]), layers(nybble.load(tmp_path / "out")[0])
    assert all(torch.equal(before[name].codes, q.codes) for name, q in after.items())
    moved = [name for name, q in after.items() if not torch.equal(q.dequantize(), before[name].dequantize())]
    rows = {row["name"]: row for row in json.loads((tmp_path / "out/nybble.json").read_text())["layers"]}
    for name, q in after.items():
        learned, (was, now) = rows[name]["learned"], (each.params.scale for each in (before[name], q))
        assert isinstance(was, torch.Tensor) and isinstance(now, torch.Tensor)
        ratio = (now.float() / was.float()).flatten().tolist()
        assert learned["codes"] == 0 and learned["scales"][::2] == pytest.approx([min(ratio), max(ratio)], rel=1e-3)
    assert len(moved) == len(after) and [*found["evaluation"]["models"]] == ["float", "before", "after"]


def test_a_float_model_is_packed_first_and_only_the_result_stays(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "out", "efficientqat-e2e", weights="int3 group=16 symmetric=false")
    assert not (tmp_path / "out/base").exists()
    formats = {q.format.name for q in layers(nybble.load(tmp_path / "out")[0]).values()}
    assert formats == {"int3_full"}


@pytest.mark.parametrize("more", [{"inputs": "int8 token"}, {"ignore": ["lm_head", "re:.*up_proj"]}])
def test_a_recipe_whose_scheme_says_more_than_a_base_gets(folder: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    """Refused before anything is packed; on what quantize packed under it the recipe trains."""
    scheme = {"weights": "int4 group=16", **more}
    made = {"method": "scales", "scheme": scheme, "settings": {"batch": 2, "accumulate": 1}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(made))
    with pytest.raises(UsageError, match=r"in one line, and its scheme says more\. Pack first: nybble quantize"):
        run(folder, tmp_path / "out", str(tmp_path / "mine.yaml"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    nybble.quantize(str(folder / "model"), "rtn", out=tmp_path / "base", scheme=scheme)
    found = run(folder, tmp_path / "out", str(tmp_path / "mine.yaml"), model=tmp_path / "base")
    assert found["steps"] == 3


def test_texts_of_its_own_are_made_once(folder: Path, tmp_path: Path) -> None:
    """And a kill between them is gone on behind."""
    given: dict[str, Any] = {"data": "self:5", "options": {"losses": {"logits": 1}}}
    run(folder, tmp_path / "whole", **given)
    lines = (tmp_path / "whole/generated.jsonl").read_text().splitlines()
    assert 1 <= len(lines) <= 5 and all(json.loads(line)["text"].strip() for line in lines)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out", **given, progress=_Stops(2))
    run(folder, tmp_path / "out", **given, settings=replace(SETTINGS, resume=True))
    assert files(tmp_path / "out", tmp_path / "whole") == files(tmp_path / "whole", tmp_path / "whole")


class _Seen:
    """What an objective was called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dtypes, plain = set[tuple[str, torch.dtype]](), Objective.__call__

        def call(objective: Any, model: Any, batch: Any, progress: float) -> Any:
            kept = [t for t in model.parameters() if t.requires_grad]
            self.dtypes |= {("weights", t.dtype) for t in kept}
            self.dtypes |= {("teacher", t.dtype) for t in objective.teacher.parameters()}
            layer = model.get_submodule("model.layers.0.mlp.up_proj")
            hook = layer.register_forward_hook(lambda _, given, out: self.dtypes.add(("product", out.dtype)))
            assert not any(t.requires_grad for t in objective.teacher.parameters()) and not objective.teacher.training
            found = plain(objective, model, batch, progress)
            hook.remove()
            return found

        monkeypatch.setattr(Objective, "__call__", call)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_train_in_float32_whatever_they_are_multiplied_in(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Updates of a rate that bfloat16 would lose are kept; what is measured is what is on disk."""
    seen, wanted = _Seen(monkeypatch), getattr(torch, dtype)
    settings = replace(SETTINGS, dtype=dtype, lr=1e-3)
    found = run(folder, tmp_path / "out", settings=settings, judged_on=str(folder / "data.jsonl"), options=TAUGHT)
    assert seen.dtypes == {("weights", torch.float32), ("teacher", wanted), ("product", wanted)}
    model, tokenizer = nybble.load(tmp_path / "out")
    task = loop.TASKS.get("language")
    rows = task.load(str(folder / "data.jsonl"), _Origin(tokenizer), model, 16, "evaluation").rows
    assert task.measure(model, _Origin(tokenizer), rows, 8, Silent()) == found["evaluation"]["models"]["after"]
    assert next(model.parameters()).dtype == torch.float32  # as the model's files


def test_a_teacher_of_another_size_and_a_packed_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits alone are compared; each says something else, and nothing is unpacked anew at every update."""
    plain, unpacked = Objective.__call__, list[bool]()

    def call(objective: Any, model: Any, batch: Any, progress: float) -> Any:
        unpacked.extend(not each.holds for each in objective.teacher.modules() if isinstance(each, Packed))
        return plain(objective, model, batch, progress)

    monkeypatch.setattr(Objective, "__call__", call)
    save_tiny(tmp_path / "larger", dtype=torch.float32, num_hidden_layers=3, intermediate_size=64)
    curves = []
    for name, teacher in (("own", None), ("larger", tmp_path / "larger"), ("packed", folder / "packed")):
        given = None if teacher is None else str(teacher)
        found = run(folder, tmp_path / f"by-{name}", options={"losses": {"logits": 1}}, teacher=given)
        assert found["teacher"] == (given or str(folder / "model"))
        curves.append(found["curve"][0][1])
    assert len(set(curves)) == 3 and all(loss > 0 for loss in curves)
    assert unpacked and not any(unpacked)


def _teachers(place: Path) -> dict[str, str]:
    """That can't be, and why."""
    save_tiny(place / "rows", dtype=torch.float32, vocab_size=301)
    shutil.copytree(place / "rows", place / "words")
    save_tiny(place / "words")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["added"])
    tokenizer.save_pretrained(place / "words")
    kind: Any = transformers.BertForSequenceClassification
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    kind(transformers.BertConfig(vocab_size=300, **sizes)).save_pretrained(place / "bert")
    return {
        "rows": "has 301 tokens, and the model 300; give one of the same",
        "words": "has another vocabulary than the model",
        "bert": "is a BertForSequenceClassification, which does something else than the model",
        "nowhere": "nowhere",
    }


def test_teachers_that_say_something_else(folder: Path, tmp_path: Path) -> None:
    """Before anything is written."""
    cases = _teachers(tmp_path)
    before = sorted(tmp_path.iterdir())
    for name, wrong in cases.items():
        with pytest.raises(NybbleError, match=wrong):
            run(folder, tmp_path / "out", options=TAUGHT, teacher=str(tmp_path / name))
        assert sorted(tmp_path.iterdir()) == before


PRODUCTS = {"rules": [{"targets": ["Attention"], "matmuls": "int8 token"}]}


def test_where_no_layer_is_packed_there_is_no_page_of_layers(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    tokenizer = tiny_tokenizer()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=32, num_attention_heads=2, **sizes
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [json.dumps({"text": word, "label": i % 2}) for i, word in enumerate(WORDS[3:9])]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    run(tmp_path, tmp_path / "out", "qat", weights=None, activations=None, scheme=PRODUCTS)
    page = (tmp_path / "out/report.html").read_text()
    assert "6 records" in page and "layers.html" not in page and not (tmp_path / "out/layers.html").exists()
    assert not write_report(tmp_path / "out")["evaluated"]


RECIPE = """
method: qat
scheme: {weights: int4 group=16}
options: {losses: {task: 1, logits: 0.5}}
settings: {steps: 2, batch: 1, accumulate: 1, seq_len: 16, dtype: float32}
"""


def test_the_command_takes_a_file_and_says_where_pages_are(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    some = ("mine.yaml", folder / "model", "out", "--data", folder / "data.jsonl")

    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["nybble", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.err if ended.value.code else said.out

    assert call("train", "no.yaml", *some[1:]) == (2, "nybble: no recipe file no.yaml.\n")
    code, said = call("train", *some, "--set", "losse=1")
    assert code == 2 and "has no option 'losse'. Did you mean 'losses'" in said
    code, said = call("train", *some)
    assert code == 0 and "2 updates" in said and "out/report.html shows it" in said
    code, said = call("report", "out")
    assert code == 0 and "2 updates" in said and "out/layers.html" in said and "no held-out losses" in said
    assert "layers_report" not in json.loads(call("report", "out", "--out", "x.html", "--json")[1])
    shown = yaml.safe_load(call("recipes", "mine.yaml")[1])
    assert shown["method"] == "qat" and shown["settings"]["steps"] == 2


def test_the_last_checkpoint_before_a_loss_that_is_no_number_stays_and_is_named(folder: Path, tmp_path: Path) -> None:
    wild = replace(SETTINGS, lr=1e30, clip=1e30, steps=5, warmup=0.0)
    with pytest.raises(LearningError, match=r"use a smaller lr.*stays in .*out\.partial/checkpoints/checkpoint-\d"):
        run(folder, tmp_path / "out", settings=wild)
    assert (tmp_path / "out.partial/checkpoints").is_dir() and not (tmp_path / "out").exists()


def test_what_a_run_cannot_go_on_from(folder: Path, tmp_path: Path) -> None:
    """Another recipe's checkpoint; one with files that are broken or missing: without it the run goes on."""
    whole, out, again = tmp_path / "whole", tmp_path / "out", replace(SETTINGS, resume=True)
    with pytest.raises(KeyboardInterrupt):
        run(folder, out, progress=_Stops(3))
    partial = tmp_path / "out.partial"
    with pytest.raises(FileError, match=r"begun with method = \"qat\"; now it is \"llm-qat\""):
        run(folder, out, "llm-qat", again)
    last = partial / "checkpoints/checkpoint-2"
    for name in ("optimizer.pt", "rng_state.pth"):
        kept = (last / name).read_bytes()
        (last / name).write_bytes(b"?")
        with pytest.raises(FileError, match=r"checkpoint-2.* can't be read: .*Remove .*checkpoint-2: --resume goes on"):
            run(folder, out, settings=again)
        (last / name).write_bytes(kept)
    (last / "scheduler.pt").unlink()
    with pytest.raises(FileError, match=r"checkpoint-2 lacks scheduler\.pt\. Remove"):
        run(folder, out, settings=again)
    request = partial / "request.json"
    kept = request.read_bytes()
    request.write_bytes(b"{")
    with pytest.raises(FileError, match=r"request\.json, which --resume goes by \(start anew without it\), can't be"):
        run(folder, out, settings=again)
    request.write_bytes(kept)
    shutil.rmtree(last)
    run(folder, whole)
    run(folder, out, settings=again)
    assert files(out, whole) == files(whole, whole)


def test_a_kill_before_the_first_checkpoint_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out", progress=_Stops(1), settings=replace(SETTINGS, save_every=3))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"recipe": "gptq"}, UsageError, "doesn't train by itself: nybble quantize"),
        ({"recipe": "qatt"}, UsageError, r"unknown training recipe 'qatt'. Did you mean 'qat'"),
        ({"model": "packed"}, UsageError, "quantized already; give the float model"),
        ({"recipe": "distill", "model": "packed"}, UsageError, "--teacher MODEL"),
        ({"options": {"losses": {"logitz": 1}}}, UsageError, "unknown training loss 'logitz'"),
        ({"options": {"losses": {"task": -1}}}, SchemeError, "losses: task has a weight of 0 or more"),
        ({"options": {"losses": {}}}, SchemeError, "nothing is left to learn from"),
        ({"options": {"teacher": "stage"}}, UsageError, "there is one stage"),
        ({"options": {"stages": [{"weights": "int8"}]}}, SchemeError, r"stages\[0\].*a stage has scheme and learned"),
        ({"options": {"learned": {"wights": "lsq"}}}, SchemeError, "learned: parts learn .*; got 'wights'"),
        ({"options": {"learned": {"weights": "lsqq"}}}, UsageError, "unknown learned part 'lsqq'"),
        ({"options": {"learned": {"matmuls": "lsq"}}}, UsageError, "a part for matmuls, and the scheme rounds none"),
        ({"options": {"what": "learned"}}, SchemeError, "these learn nothing; say all"),
        ({"options": {"rates": {"scalez": 1.0}}}, UsageError, "no layer learns 'scalez'"),
        ({"data": None}, UsageError, "give --data SRC"),
        ({"data": "self:few"}, UsageError, "self is followed by the number of texts"),
        ({"merge": True}, UsageError, "leave --merge out"),
        ({"recipe": "qlora", "teacher": "x"}, UsageError, "recipe qlora has no teacher; leave"),
        ({"teacher": "x"}, UsageError, r"recipe qat has no teacher: its losses \(task\) compare with none"),
        ({"options": {"stages": [{"scheme": "W8A8"}], "teacher": "stage"}}, UsageError, "stage has nothing to teach"),
        (
            {"options": {"stages": [{"scheme": "W8A8", "learned": "lsq"}]}},
            SchemeError,
            r"stages\[0\].*a mapping of roles .*'lsq'",
        ),
        ({"packed": True}, UsageError, "trains float weights.*leave --packed out"),
    ],
)  # fmt: skip
def test_what_is_refused(
    folder: Path, tmp_path: Path, given: dict[str, Any], error: type[NybbleError], match: str
) -> None:
    if given.get("recipe") == "qlora":
        pytest.importorskip("peft", reason="needs PEFT, which nybble's extra 'train' brings")
    if "model" in given:
        given = {**given, "model": folder / given["model"]}
    with pytest.raises(error, match=match):
        run(folder, tmp_path / "out", **given)
    assert not [*tmp_path.iterdir()]


def test_a_state_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    from nybble.training.state import load_state, save_state

    model, other = nybble.load(folder / "model")[0], nybble.load(folder / "packed")[0]
    save_state(model, tmp_path / "state")
    before = logits(model)
    with pytest.raises(FileError, match="is of another model"):
        load_state(other, tmp_path / "state")
    (tmp_path / "state").write_bytes(b"{")
    with pytest.raises(FileError, match="can't be read"):
        load_state(model, tmp_path / "state")
    assert torch.equal(logits(model), before)
